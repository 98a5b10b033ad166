"""Thin: which heads and neurons stay, the weights that make up for the others, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BLOCKS, CONTEXT, assert_equal, corpus, logits, refused, tiny, tokenizer, unchanged, windows

from layerfold.calibration import Calibration
from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import Model
from layerfold.checkpoint.provenance import Provenance
from layerfold.checkpoint.weighing import parameters
from layerfold.errors import InputError, ModelError
from layerfold.inference.stepping import Stepper
from layerfold.methods import Merge, Steps, Thin
from layerfold.methods.thin.versions import Shape, walked
from layerfold.model.decoder import Decoder
from layerfold.repair.refit import refit_
from layerfold.text.windows import cut_windows

FAMILIES = pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "opt", "phi3", "gptj", "granite", "falcon"])


def thinned(decoder: Decoder, heads: Any, neurons: Any) -> Decoder:
    found = decoder.copy()
    Thin(heads=heads, neurons=neurons).apply(found, Calibration(found, windows()))
    return found


def whole(decoder: Decoder) -> tuple[list[int], list[int]]:
    return list(decoder.heads), list(decoder.d_ffn)


@FAMILIES
def test_blocks_that_keep_everything_stay_bit_equal(family: str) -> None:
    decoder = tiny(family).decoder
    with unchanged(decoder):
        Thin(heads=decoder.heads, neurons=decoder.d_ffn).apply(decoder, Calibration(decoder, windows()))


@FAMILIES
def test_heads_and_neurons_that_put_out_nothing_go_and_no_logit_changes(family: str) -> None:
    decoder = tiny(family).decoder
    for block in decoder.blocks:
        block.ffn.down.weight[:, block.index % 2 :: 2] = 0
        block.attention.output.weight[:, : block.attention.channels] = 0
    found = thinned(decoder, [heads - 1 for heads in decoder.heads], [width // 2 for width in decoder.d_ffn])
    assert found.d_ffn == tuple(width // 2 for width in decoder.d_ffn)
    assert (logits(found) - logits(decoder)).abs().max() < 1e-4


def test_a_neuron_is_stood_in_for_by_its_double(family: str) -> None:
    decoder = tiny(family).decoder
    for block in decoder.blocks:
        half = torch.arange(block.d_ffn // 2)
        for matrix in block.ffn.matrices[:-1]:
            for tensor in matrix.tensors:
                tensor[len(half) :] = tensor[: len(half)]
    found = thinned(decoder, decoder.heads, [width // 2 for width in decoder.d_ffn])
    other = decoder.copy()  # one of each pair, with the weights that it had
    Thin(heads=decoder.heads, neurons=found.d_ffn).outline().apply(other, None)
    errors = [float((logits(each) - logits(decoder)).square().mean()) for each in (found, other)]
    assert errors[0] < 0.05 * errors[1]


@FAMILIES
def test_the_rest_comes_closer_to_what_the_blocks_did_than_the_first_heads_and_neurons_do(family: str) -> None:
    decoder, cut = tiny(family).decoder, windows()
    heads, neurons = [1] * BLOCKS, [width // 3 for width in decoder.d_ffn]
    found, other = thinned(decoder, heads, neurons), decoder.copy()
    Thin(heads=tuple(heads), neurons=tuple(neurons)).outline().apply(other, None)
    assert parameters(found) == parameters(other) < parameters(decoder)
    errors = []
    for each in (found, other):
        mine, original = Stepper(each), Stepper(decoder)
        hidden = original.embed(cut.input_ids)
        mine.embed(cut.input_ids)
        total = 0.0
        for index in range(BLOCKS):
            left = original.step(index, hidden)
            total += float((mine.step(index, hidden) - left).square().sum() / (left - hidden).square().sum())
            hidden = left
        errors.append(total)
    assert errors[0] < 0.7 * errors[1]


@FAMILIES
def test_sublayers_and_blocks_that_keep_nothing_go(family: str) -> None:
    decoder = tiny(family).decoder
    heads, neurons = whole(decoder)
    found = thinned(decoder, [0, heads[1], 0, 1], [neurons[0], 0, 0, 5])
    assert found.n_blocks == 3
    assert found.heads == (0, heads[1], 1)
    assert found.d_ffn == (neurons[0], 0, 5)
    assert found.removed_parts == {"attention": (0,), "ffn": (1,)}
    assert logits(found).isfinite().all()
    assert parameters(found) == parameters(_outline(decoder, [0, heads[1], 0, 1], [neurons[0], 0, 0, 5]))


def _outline(decoder: Decoder, heads: list[int], neurons: list[int]) -> Decoder:
    found = decoder.copy(share=True)
    Thin(heads=tuple(heads), neurons=tuple(neurons)).outline().apply(found, None)
    return found


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_block_does_the_work_of_those_behind_it_that_go(family: str) -> None:
    decoder = tiny(family).decoder
    for part in ("attention", "ffn"):  # block 2 adds a constant or nothing
        for tensor in decoder.blocks[2].output(part).tensors:  # type: ignore[union-attr]
            tensor.fill_(0.3 if tensor.dim() == 1 else 0)
    heads, neurons = whole(decoder)
    found = thinned(decoder, [*heads[:2], 0, heads[3]], [*neurons[:2], 0, neurons[3]])
    assert found.n_blocks == 3
    assert (logits(found) - logits(decoder)).abs().max() < 1e-3


def test_an_ffn_that_goes_takes_its_bias_with_it_and_the_attention_makes_up_for_that() -> None:
    decoder = tiny("gpt2").decoder
    ffn = decoder.blocks[1].ffn
    ffn.down.weight.zero_()
    ffn.down.bias.fill_(0.7)  # type: ignore[union-attr]
    heads, neurons = whole(decoder)
    found = thinned(decoder, heads, [neurons[0], 0, *neurons[2:]])
    assert (logits(found) - logits(decoder)).abs().max() < 1e-3


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_version_of_a_block_is_what_the_method_makes_of_it_and_shares_the_rest(family: str) -> None:
    decoder, cut = tiny(family).decoder, windows()
    heads, neurons = whole(decoder)
    found = thinned(decoder, [heads[0], 1, *heads[2:]], [neurons[0], 7, *neurons[2:]])
    wanted = {1: [(Shape(1, 7), 1), (Shape(heads[1], 0), 2), (Shape(heads[1], neurons[1]), 3)]}
    with unchanged(decoder):
        versions = {
            (shape, length): version.of(decoder.blocks[1]) for _, shape, length, version in walked(decoder, cut, wanted)
        }
    assert sorted(versions) == sorted(wanted[1])
    one = dict(versions[Shape(1, 7), 1].named_parameters())
    assert_equal(dict(found.blocks[1].module.named_parameters()), one)
    own = {id(parameter) for parameter in decoder.model.parameters()}
    norms = [parameter for name, parameter in one.items() if "norm" in name or "ln_" in name]
    assert norms
    assert all(id(parameter) in own for parameter in norms)


@FAMILIES
def test_a_repair_follows_and_the_result_reloads(family: str, tmp_path: Path) -> None:
    decoder = tiny(family).decoder
    heads, neurons = whole(decoder)
    found = thinned(decoder, [0, heads[1], 0, 1], [neurons[0], 0, 0, 5])
    refit_(found, decoder, [1, 3, 4], windows(), attention=True)
    Model(found, tokenizer(), Provenance("tiny")).save(tmp_path / "thin", format="compact")
    assert (logits(load(str(tmp_path / "thin")).decoder) - logits(found)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("settings", "received", "accepted"),
    [
        ({"heads": "4,x", "neurons": "8,8"}, "heads '4,x'", "one number a block"),
        ({"heads": "", "neurons": "8"}, "heads ''", "one number a block"),
        ({"heads": "4", "neurons": "-8"}, "neurons '-8'", "one number a block"),
        ({"heads": (4, 4), "neurons": (8,)}, "heads of 2 blocks and neurons of 1", "as many"),
        ({"heads": "0,0", "neurons": "0,0"}, "all 0", "at least one block"),
    ],
)
def test_a_wrong_setting_says_what_was_received_and_what_is_accepted(
    settings: dict[str, Any], received: str, accepted: str
) -> None:
    with refused(InputError, re.escape(received), says=accepted):
        Thin(**settings)


def test_a_decoder_that_cannot_be_thinned_is_refused_before_anything_is_edited() -> None:
    decoder, cut = tiny("gpt2").decoder, windows()
    for heads, neurons, said in (
        ("4,4", "8,8", "heads and neurons of 2 blocks for a model of 4"),
        ("5,4,4,4", "8,8,8,8", r"5 heads of block 0; accepted: 0 \.\.\. 4"),
        ("4,4,4,4", "8,8,8,129", r"129 neurons of block 3; accepted: 0 \.\.\. 128"),
    ):
        with unchanged(decoder), refused(InputError, said):
            Thin(heads=heads, neurons=neurons).apply(decoder, Calibration(decoder, cut))
    asked = Thin(heads="4,4,4,4", neurons="8,8,8,8")
    with unchanged(decoder), refused(InputError, "thin needs calibration text"):
        asked.apply(decoder, None)
    one = cut_windows(corpus(), tokenizer(), context=CONTEXT, limit_tokens=CONTEXT)
    with unchanged(decoder), refused(InputError, "calibration text of 1 window"):
        asked.apply(decoder, Calibration(decoder, one))
    Merge(n=2, tie=True, align="none").apply(decoder, None)
    with unchanged(decoder), refused(InputError, "thin, of blocks that share an FFN"):
        asked.apply(decoder, Calibration(decoder, cut))
    normed = tiny("gemma2").decoder
    with unchanged(normed), refused(InputError, "whose output is normalised"):
        Thin(heads=normed.heads, neurons="8,8,8,8").apply(normed, Calibration(normed, cut))
    broken = tiny("gpt2").decoder
    broken.blocks[0].ffn.up.weight.fill_(1e25)
    with refused(ModelError, "not finite"):
        asked.apply(broken, Calibration(broken, cut))


def test_counts_are_spelled_out_and_read_back() -> None:
    method = Thin(heads=(4, 0, 0, 1), neurons=" 8, 0,0,9 ")
    assert method.to_json() == {"thin": {"heads": "4,0,0,1", "neurons": "8,0,0,9"}}
    assert (
        Thin(**method.to_json()["thin"]).shapes == method.shapes == [Shape(4, 8), Shape(0, 0), Shape(0, 0), Shape(1, 9)]
    )
    assert method.resolved(tiny("gpt2").decoder) == {"name": "thin", "heads": "4,0,0,1", "neurons": "8,0,0,9"}
    assert method.said == "thin to 5 heads and 17 neurons without 1,2"
    assert method.removes_blocks
    assert not Thin(heads="4", neurons="0").removes_blocks
    assert [*Thin.told(method.to_json()["thin"], {})] == [
        "heads of each block:   4,0,0,1",
        "neurons of each block: 8,0,0,9",
    ]
    assert Steps((method, Merge(n=2))).needs_calibration
