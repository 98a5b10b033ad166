from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from tiny import BLOCKS, correlations, logits, tiny, windows

from layerfold.calibration import Calibration
from layerfold.methods import Collapse, Merge, Share
from layerfold.model.decoder import Decoder
from layerfold.repair.rescale import rescale_

ANCHORS = pytest.mark.parametrize("anchor", ["first", "middle", "last"])
# Names of an FFN's matrices, and which axis of the stored tensor runs over neurons.
STORED = {"c_fc.weight": 1, "c_fc.bias": 0, "c_proj.weight": 0, "c_proj.bias": None}
STORED |= {f"{name}.{kind}": 0 for name in ("up_proj", "gate_proj") for kind in ("weight", "bias")}
STORED |= {"down_proj.weight": 1, "down_proj.bias": None}


def average(
    decoder: Decoder, group: range, anchor: int, order: dict[int, np.ndarray], signs: dict[int, np.ndarray]
) -> dict[str, np.ndarray]:
    """The group's average, in numpy, from the tensors as they are stored."""
    total: dict[str, np.ndarray] = {}
    for index in group:
        for name, parameter in decoder.blocks[index].ffn.module.named_parameters():
            axis = STORED[name]
            array = parameter.detach().double().numpy()
            array = array if axis is None or index == anchor else np.take(array, order[index], axis)
            if index in signs and name.startswith(("up_proj", "down_proj")) and axis is not None:
                array = array * (signs[index][:, None] if (axis, array.ndim) == (0, 2) else signs[index])
            total[name] = total.get(name, 0) + array / len(group)
    return total


def others(decoder: Decoder) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in decoder.model.state_dict().items() if ".mlp." not in name}


def ffn(decoder: Decoder, index: int) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in decoder.blocks[index].ffn.tensors()]


def equal(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def permuted_copies(family: str) -> Decoder:
    """A model whose FFNs see nearly the same, and are one with its neurons shuffled and, where gated, flipped."""
    decoder = tiny(family).decoder
    first = decoder.blocks[0]
    for block in decoder.blocks:
        for (name, parameter), source in zip(block.module.named_parameters(), first.module.parameters(), strict=True):
            if "norm" in name or "ln_" in name:
                parameter.data.copy_(source)
            elif "attn.c_proj" in name or "o_proj" in name:
                parameter.data.mul_(0.005)
        if block is not first:
            seeded = torch.Generator().manual_seed(block.index)
            order = torch.randperm(first.ffn.d_ffn, generator=seeded)
            signs = torch.where(torch.rand(len(order), generator=seeded) < 0.5, -1.0, 1.0)
            block.ffn.copy_(first.ffn.tensors(order, None if family == "gpt2" else signs))
    for block in decoder.blocks:
        for tensor in block.ffn.tensors()[-2 if block.ffn.down.bias is not None else -1 :]:
            tensor.mul_(0.01)
    return decoder


@ANCHORS
@pytest.mark.parametrize("align", ["hungarian", "none"])
def test_every_block_of_a_group_gets_the_same_average(family: str, align: Any, anchor: Any) -> None:
    decoder, cut = tiny(family).decoder, windows()
    method = Merge(n=3, align=align, anchor=anchor)
    group = range(3)
    index = method.anchor_of(group)
    order = {other: np.arange(decoder.blocks[0].ffn.d_ffn) for other in group if other != index}
    signs: dict[int, np.ndarray] = {}
    for i in order if align == "hungarian" else ():
        correlation = correlations(decoder, cut, index, i)
        order[i] = linear_sum_assignment(-correlation if family == "gpt2" else -np.abs(correlation))[1]
        if family != "gpt2":
            signs[i] = np.sign(correlation[np.arange(len(correlation)), order[i]])
    expected = average(decoder, group, index, order, signs)
    method.apply(decoder, Calibration(decoder, cut) if align == "hungarian" else None)
    for block in decoder.blocks[:3]:
        parameters = dict(block.ffn.module.named_parameters())
        assert parameters.keys() == expected.keys()
        for name, parameter in parameters.items():
            assert np.abs(parameter.detach().numpy() - expected[name]).max() < 1e-6, (block.index, name)


@pytest.mark.parametrize("tie", [False, True])
def test_nothing_but_ffns_is_touched(family: str, tie: bool) -> None:
    decoder = tiny(family).decoder
    before = others(decoder)
    Merge(n=4, tie=tie, align="none").apply(decoder, None)
    after = others(decoder)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert decoder.n_blocks == BLOCKS


def test_merging_identical_ffns_is_the_identity(family: str) -> None:
    decoder = tiny(family).decoder
    for block in decoder.blocks[1:]:
        block.ffn.copy_(decoder.blocks[0].ffn.tensors())
    before = logits(decoder)
    Merge(n=BLOCKS, align="none").apply(decoder, None)
    assert (logits(decoder) - before).abs().max() < 1e-5


@ANCHORS
def test_permuted_copies_merge_back_by_hungarian_and_change_no_logit(family: str, anchor: Any) -> None:
    decoder = permuted_copies(family)
    before, kept = logits(decoder), {i: ffn(decoder, i) for i in range(BLOCKS)}
    method = Merge(n=BLOCKS, anchor=anchor)
    notes = method.apply(decoder, Calibration(decoder, windows()))
    expected = kept[method.anchor_of(range(BLOCKS))]
    for index in range(BLOCKS):
        for tensor, original in zip(ffn(decoder, index), expected, strict=True):
            assert torch.allclose(tensor, original, atol=1e-6)
    assert (logits(decoder) - before).abs().max() < 1e-4
    assert all(pair["correlation"] > 0.9 > 0.5 > pair["unaligned"] for pair in notes["pairs"])


def test_permuted_copies_do_not_merge_back_without_alignment(family: str) -> None:
    decoder = permuted_copies(family)
    before = logits(decoder)
    Merge(n=BLOCKS, align="none").apply(decoder, None)
    assert (logits(decoder) - before).abs().max() > 0.1


@pytest.mark.parametrize("align", ["hungarian", "none"])
def test_tying_changes_no_logit_and_saves_parameters(family: str, align: Any) -> None:
    decoder = tiny(family).decoder
    calibration = Calibration(decoder, windows())
    calibration.matches([(0, 1), (2, 3)])  # before either edit
    plain, tied = decoder.copy(), decoder.copy()
    Merge(n=2, align=align).apply(plain, calibration)
    Merge(n=2, align=align, tie=True).apply(tied, calibration)
    assert torch.equal(logits(plain), logits(tied))
    assert plain.size() == decoder.size()
    one_ffn = sum(tensor.numel() for tensor in ffn(decoder, 0))
    assert decoder.size().parameters - tied.size().parameters == 2 * one_ffn


def test_blocks_outside_the_groups_stay_bit_equal() -> None:
    decoder = tiny("gpt2").decoder
    before = {i: ffn(decoder, i) for i in range(BLOCKS)}
    Merge(groups="1-2", align="none").apply(decoder, None)
    assert [equal(ffn(decoder, i), before[i]) for i in range(BLOCKS)] == [True, False, False, True]


@pytest.mark.parametrize(("depth", "groups"), [(4, [{0, 1, 2}, {3}]), (5, [{0, 1, 2}, {3, 4}]), (3, [{0, 1, 2}])])
def test_the_last_group_is_shorter_where_the_depth_is_no_multiple(depth: int, groups: list[set[int]]) -> None:
    decoder = tiny("gpt2", n_layer=depth).decoder
    Merge(n=3, align="none", tie=True).apply(decoder, None)
    by_storage: dict[int, set[int]] = {}
    for block in decoder.blocks:
        by_storage.setdefault(block.ffn.up.weight.data_ptr(), set()).add(block.index)
    assert list(by_storage.values()) == groups


def test_notes_give_the_mean_correlation_of_each_pair() -> None:
    decoder, cut = tiny("gpt2").decoder, windows()
    expected = {pair: correlations(decoder, cut, *pair) for pair in [(1, 0), (1, 2)]}
    notes = Merge(groups="0-2", anchor="middle").apply(decoder, Calibration(decoder, cut))
    assert [(pair["anchor"], pair["block"]) for pair in notes["pairs"]] == [(1, 0), (1, 2)]
    for pair, correlation in zip(notes["pairs"], expected.values(), strict=True):
        matched = correlation[linear_sum_assignment(-correlation)].mean()
        assert pair["correlation"] == pytest.approx(matched, abs=1e-4)
        assert pair["unaligned"] == pytest.approx(np.diagonal(correlation).mean(), abs=1e-4)


def test_half_precision_weights_are_averaged_without_rounding_at_each_step() -> None:
    decoder = tiny("gpt2").decoder
    decoder.model.to(torch.bfloat16)
    expected = torch.stack([block.ffn.up.weight.double() for block in decoder.blocks]).mean(0).bfloat16()
    Merge(n=BLOCKS, align="none").apply(decoder, None)
    assert torch.equal(decoder.blocks[3].ffn.up.weight, expected)


def test_merging_a_tied_model_anew_leaves_blocks_outside_the_groups_alone() -> None:
    decoder = tiny("gpt2").decoder
    Merge(n=2, align="none", tie=True).apply(decoder, None)
    before = {i: ffn(decoder, i) for i in range(BLOCKS)}
    Merge(groups="1-2", align="none").apply(decoder, None)
    # Blocks 0 and 3 shared their FFNs with 1 and 2, which are now another's.
    assert [equal(ffn(decoder, i), before[i]) for i in range(BLOCKS)] == [True, False, False, True]


def test_groups_that_cut_across_ties_are_each_averaged_from_the_model_as_it_was() -> None:
    decoder = tiny("gpt2").decoder
    Merge(groups="1-2", align="none", tie=True).apply(decoder, None)
    expected = {i: [(a + b) / 2 for a, b in zip(ffn(decoder, i), ffn(decoder, i + 1), strict=True)] for i in (0, 2)}
    Merge(n=2, align="none").apply(decoder, None)
    assert [equal(ffn(decoder, i), expected[i - i % 2]) for i in range(BLOCKS)] == [True] * BLOCKS


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("way", ["tied", "collapsed", "shared", "rescaled"])
def test_ffns_that_compute_the_same_with_neurons_flipped_are_one(family: str, way: str) -> None:
    decoder = tiny(family).decoder
    one, two = (decoder.blocks[index].ffn for index in (1, 2))
    seeded = torch.Generator().manual_seed(3)
    order = torch.randperm(one.d_ffn, generator=seeded)
    signs = torch.where(torch.rand(one.d_ffn, generator=seeded) < 0.5, -1.0, 1.0)
    for block in decoder.blocks[1:3]:  # both see nearly the same
        block.attention.output.weight.mul_(0.01)
        block.module.post_attention_layernorm.weight.data.fill_(1)  # type: ignore[union-attr, operator]
    one.down.weight.mul_(0.01)
    two.copy_(one.tensors(order, signs))
    before, calibration = logits(decoder), Calibration(decoder, windows())
    if way == "collapsed":
        expected = decoder.copy()
        expected.keep_([0, 1, 3])
        before = logits(expected)
        Collapse(groups="1-2").apply(decoder, calibration)
    elif way == "shared":
        Share(window="1:2", rank=0, base="mean", init="svd").apply(decoder, calibration)
    else:
        method, original = Merge(groups="1-2", tie=True), decoder.copy()
        sources = method.members(decoder, calibration)
        notes = method.apply(decoder, calibration)
        assert notes["pairs"][0]["correlation"] > 0.9 > 0.5 > notes["pairs"][0]["unaligned"]
        if way == "rescaled":
            told = rescale_(decoder, original, sources, windows())
            assert all(each.shrunk == pytest.approx(1, abs=0.1) for each in told)
            return
    assert (logits(decoder) - before).abs().max() < 1e-4
