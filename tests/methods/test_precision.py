"""Models in half precision: each method is right, or refuses in one line before it edits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pruning import CUT, blocks, fresh, prunable
from tiny import BLOCKS, refused, tiny, unchanged

import layerfold
from layerfold.calibration import Calibration
from layerfold.errors import InputError
from layerfold.methods import Collapse, Drop, Merge, Prune, Share
from layerfold.model.decoder import Decoder

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
RIGHT: list[Any] = [
    Drop(blocks="1"),
    Drop(blocks="1", part="ffn"),
    Merge(n=2, align="none"),
    Merge(n=2, align="none", tie=True),
    Collapse(n=2, align="none"),
    *(Prune(sparsity=0.4, scope=scope) for scope in ("global", "matrix", "row")),
    *(Prune(sparsity=0.4, scope=scope, structure="neurons") for scope in ("global", "matrix")),
    Prune(structure="2:4"),
    Prune(sparsity=0.4, criterion="published"),
    *(Share(window="0:2", rank=2, base=base, init="svd", align="none") for base in ("anchor", "mean", "fitted")),
    Share(window="0:2", rank=2, base="mean", init="zero", align="none"),
]
REFUSED: list[Any] = [
    Merge(n=2),
    Collapse(n=2),
    Share(window="0:2", rank=2, init="svd"),
    Share(window="0:2", rank=2, align="none"),
    Share(rank=2, init="svd", align="none"),
    Merge(n=2, groups="auto", align="none"),
    *(Prune(sparsity=0.4, criterion=criterion) for criterion in ("wanda", "sparsegpt")),
    *(Prune(sparsity=0.4, criterion=each, structure="neurons") for each in ("wanda", "sparsegpt", "taylor")),
    Prune(sparsity=0.4, criterion="taylor", structure="neurons+heads"),
]


def halved(decoder: Decoder, dtype: torch.dtype) -> Decoder:
    decoder.model.to(dtype)
    return decoder


def distinct(decoder: Decoder) -> dict[str, torch.Tensor]:
    return {name: each.detach().float() for name, each in decoder.model.named_parameters()}


@HALF
@pytest.mark.parametrize("method", RIGHT, ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_what_reads_no_activations_does_as_in_float32(name: str, method: Any, dtype: torch.dtype) -> None:
    decoder = halved(fresh(name), dtype)
    exact, before = decoder.copy(), sum(decoder.d_ffn)
    exact.model.float()
    notes, expected = method.apply(decoder, None), method.apply(exact, None)
    assert decoder.model.dtype == dtype
    assert (notes, decoder.size(), decoder.d_ffn) == (expected, exact.size(), exact.d_ffn)
    if "sparsity" in vars(method) and (method.structure, method.scope) == ("neurons", "global"):
        assert sum(decoder.d_ffn) == before - round(0.4 * before), "as many as were asked for"
    found = distinct(decoder)
    for name, weight in distinct(exact).items():  # to the rounding of the result
        assert (found[name] - weight).abs().max() <= torch.finfo(dtype).eps * weight.abs().max(), name


@HALF
@pytest.mark.parametrize("method", REFUSED, ids=str)
def test_what_reads_activations_is_refused_in_one_line(method: Any, dtype: torch.dtype, study_corpus: str) -> None:
    model = tiny("llama")
    halved(model.decoder, dtype)
    said = rf"is {str(dtype).removeprefix('torch.')}, .*accepted: .*model\.float\(\)"
    with unchanged(model.decoder), refused(InputError, said):
        layerfold.compress(model, method, corpus=study_corpus, tokens=100, in_place=True)
    with pytest.raises(InputError, match="what reads activations takes float32"):
        Calibration(model.decoder, CUT)


@pytest.mark.parametrize("level", ["rescale", "refit", "refit+attention"])
def test_a_repair_is_refused_before_the_edit(level: Any, study_corpus: str) -> None:
    model = tiny("gpt2")
    halved(model.decoder, torch.bfloat16)
    with pytest.raises(InputError, match="what reads activations takes float32"):
        layerfold.compress(model, Drop(blocks="1"), corpus=study_corpus, repair=level, repair_tokens=100, in_place=True)
    assert model.decoder.n_blocks == BLOCKS


def test_double_precision_is_pruned_to_the_weight() -> None:
    decoder = halved(fresh("llama"), torch.float64)
    total, _ = prunable(decoder)
    Prune(sparsity=0.3).apply(decoder, None)
    assert prunable(decoder)[1] == total - round(0.3 * total)
    left = min(float(each.matrix.weight[each.matrix.weight != 0].abs().min()) for each in blocks(decoder))
    assert left > 0.01
