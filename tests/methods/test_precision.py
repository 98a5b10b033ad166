"""Models in half precision; see `tests/test_devices.py` for the methods that read activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pruning import CUT, blocks, fresh, prunable
from tiny import refused, tiny, unchanged

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
SEARCHED: list[Any] = [
    (Share(rank=2, k=2, init="svd", align="none"), "none"),
    (Merge(n=2, groups="auto", align="none"), "rescale"),
    (Drop(blocks="1"), "refit"),
    (Prune(sparsity=0.4, criterion="taylor", structure="neurons"), "refit+attention"),
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


@pytest.mark.parametrize(("method", "repair"), SEARCHED, ids=str)
def test_searches_and_repairs_work_and_keep_the_dtype(method: Any, repair: Any, study_corpus: str) -> None:
    model = tiny("llama")
    halved(model.decoder, torch.bfloat16)
    options = {"corpus": study_corpus, "tokens": 200, "repair_tokens": 400}
    made = layerfold.compress(model, method, repair=repair, **options)
    assert {each.dtype for each in made.decoder.model.parameters()} == {torch.bfloat16}
    assert all(each.isfinite().all() for each in made.decoder.model.parameters())
    assert made.sha256 != model.sha256


@pytest.mark.parametrize("level", ["none", "rescale", "refit", "refit+attention"])
def test_weights_of_two_dtypes_are_refused_before_the_edit(level: Any, study_corpus: str) -> None:
    model = tiny("gpt2")
    model.decoder.blocks[1].ffn.up.module.half()
    method = Merge(n=2) if level == "none" else Drop(blocks="1")
    said = r"is float32 and .* is float16; accepted: one dtype"
    with unchanged(model.decoder), refused(InputError, said):
        layerfold.compress(model, method, corpus=study_corpus, repair=level, repair_tokens=100, in_place=True)
    with pytest.raises(InputError, match=said):
        Calibration(model.decoder, CUT)


def test_double_precision_is_pruned_to_the_weight() -> None:
    decoder = halved(fresh("llama"), torch.float64)
    total, _ = prunable(decoder)
    Prune(sparsity=0.3).apply(decoder, None)
    assert prunable(decoder)[1] == total - round(0.3 * total)
    left = min(float(each.matrix.weight[each.matrix.weight != 0].abs().min()) for each in blocks(decoder))
    assert left > 0.01
