"""Merge and collapse: the average against numpy, which blocks form a group, what is left."""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from tiny import (
    BLOCKS,
    CONTEXT,
    assert_equal,
    continued,
    corpus,
    correlations,
    deep,
    logits,
    refused,
    tiny,
    tokenizer,
    unchanged,
    windows,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from layerfold.calibration import Calibration
from layerfold.checkpoint.model import Model
from layerfold.checkpoint.provenance import Provenance
from layerfold.errors import InputError, ModelError
from layerfold.methods import Collapse, Merge, Share
from layerfold.model.decoder import Decoder
from layerfold.model.matrix import Matrix
from layerfold.repair.rescale import rescale_
from layerfold.text.windows import TokenWindows, cut_windows

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
    assert_equal(others(decoder), before)
    assert decoder.n_blocks == BLOCKS


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


@pytest.mark.parametrize("tied", [False, True])
def test_blocks_outside_the_groups_stay_bit_equal(tied: bool) -> None:
    decoder = tiny("gpt2").decoder
    if tied:  # blocks 0 and 3 share their FFNs with 1 and 2, which become another's
        Merge(n=2, align="none", tie=True).apply(decoder, None)
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


# Distinct parameters of the GPT-2 shape (12 x 768, vocabulary 50,257) after each n.
GPT2_COUNTS = {2: 81_912_576, 4: 60_648_960, 6: 53_561_088, 8: 53_561_088, 10: 53_561_088}


def gpt2_shape(device: str, **changes: int) -> Decoder:
    with torch.device(device), torch.random.fork_rng():
        torch.manual_seed(0)
        return Decoder(GPT2LMHeadModel(GPT2Config(**changes)).eval())


def distinct(decoder: Decoder) -> int:
    """Elements of distinct parameters, counted by identity."""
    return sum({id(p): p.numel() for _, p in decoder.model.named_parameters(remove_duplicate=False)}.values())


@pytest.mark.parametrize(("n", "count"), GPT2_COUNTS.items())
def test_the_gpt2_shape_is_left_with_exactly_as_many_parameters(n: int, count: int) -> None:
    decoder = gpt2_shape("meta")  # shapes alone: nothing is computed
    assert distinct(decoder) == 124_439_808
    Collapse(n=n, align="none").apply(decoder, None)
    assert decoder.n_blocks == decoder.model.config.num_hidden_layers == math.ceil(12 / n)
    assert distinct(decoder) == count


def test_a_collapsed_model_of_12_blocks_reloads_in_plain_transformers_and_generates(tmp_path: Path) -> None:
    decoder = gpt2_shape("cpu", n_embd=48, vocab_size=300)
    Collapse(n=10, align="none").apply(decoder, None)
    Model(decoder, None, Provenance("gpt2-shape")).save(tmp_path / "collapsed")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "collapsed", output_loading_info=True)
    assert not any(info.values())
    assert distinct(Decoder(model)) == distinct(decoder) == decoder.size().parameters
    assert torch.equal(logits(Decoder(model)), logits(decoder))
    assert continued(Decoder(model)) == continued(decoder, use_cache=False)


@ANCHORS
def test_a_group_becomes_its_anchor_with_the_averaged_ffn(family: str, anchor: Any) -> None:
    decoder = tiny(family).decoder
    calibration = Calibration(decoder, windows())
    method = Collapse(n=3, anchor=anchor)
    index = method.anchor_of(range(3))
    kept = [decoder.blocks[i].module.state_dict() for i in (index, 3)]
    kept = [{name: tensor.clone() for name, tensor in state.items()} for state in kept]
    merged = decoder.copy()
    calibration.matches([(index, i) for i in range(3) if i != index])  # before either edit
    Merge(n=3, anchor=anchor).apply(merged, calibration)
    method.apply(decoder, calibration)
    assert decoder.n_blocks == 2
    for block, before in zip(decoder.blocks, kept, strict=True):
        for name, tensor in block.module.state_dict().items():
            if "mlp" not in name or block.index == 1:  # attention and norms, and all of the block left alone
                assert torch.equal(tensor, before[name]), name
    # test_merge.py holds merge's average against numpy.
    for one, two in zip(decoder.blocks[0].ffn.tensors(), merged.blocks[index].ffn.tensors(), strict=True):
        assert torch.equal(one, two)


def test_named_groups_collapse_and_other_blocks_stay() -> None:
    decoder = tiny("gpt2", n_layer=6).decoder
    modules = [block.module for block in decoder.blocks]
    Collapse(groups="1-2,3-4", align="none", anchor="last").apply(decoder, None)
    assert [modules.index(block.module) for block in decoder.blocks] == [0, 2, 4, 5]


METHOD = pytest.mark.parametrize("method", [Merge, Collapse])

# Fitted averages


def passed(decoder: Decoder, cut: TokenWindows, index: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a block's FFN reads and what it puts out, (rows, d), and the rows' weights, of windows not held out."""
    block, found = decoder.blocks[index], list[tuple[Tensor, Tensor, Tensor]]()
    for row, length in enumerate(cut.lengths.tolist()):
        if row % 8 < 7:
            here: dict[str, Tensor] = {}
            watched = {"read": block.ffn.up.module, "out": block.ffn.down.module, "behind": block.module}

            def keep(name: str, here: dict[str, Tensor], _: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                here[name] = inputs[0] if name == "read" else output

            handles = [each.register_forward_hook(partial(keep, name, here)) for name, each in watched.items()]
            decoder.model(input_ids=cut.input_ids[row : row + 1, :length])
            for handle in handles:
                handle.remove()
            behind = here["behind"][0] if isinstance(here["behind"], tuple) else here["behind"]
            weight = 1 / (behind.square().mean(-1, keepdim=True) + 1e-6)
            found.append(tuple(each.reshape(length, -1) for each in (here["read"], here["out"], weight)))  # type: ignore[arg-type]
    read, out, weights = (torch.cat(each) for each in zip(*found, strict=True))
    return read, out, weights


def regressed(rows: tuple[Tensor, Tensor, Tensor], start: Tensor, ridge: float, *, biased: bool) -> Tensor:
    """The weighted ridge regression, (out, in + 1 where biased), that is drawn to a start; by QR."""
    read, out, weights = (each.double() for each in rows)
    read = torch.cat([read, torch.ones(len(read), 1)], dim=1) if biased else read
    energies = (weights * read.square()).sum(0)
    energies = ridge * energies.clamp_min(1e-6 * energies.mean())
    if biased:
        energies[-1] = 0
    stacked = torch.cat([read * weights.sqrt(), torch.diag(energies.sqrt())])
    wanted = torch.cat([out * weights.sqrt(), energies.sqrt()[:, None] * start.double().T])
    return torch.linalg.lstsq(stacked, wanted).solution.T


def joined(matrix: Matrix) -> Tensor:
    """A matrix with its bias as the last column."""
    return matrix.weight if matrix.bias is None else torch.cat([matrix.weight, matrix.bias[:, None]], dim=1)


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
@torch.no_grad()
def test_a_fitted_average_is_the_regression_of_what_each_ffn_put_out(family: str) -> None:
    decoder, cut, group = tiny(family).decoder, windows(), range(1, 3)
    original = decoder.copy()
    (fit,) = Merge(groups="1-2", align="none", average="fitted").apply(decoder, Calibration(decoder, cut))["fits"]
    assert fit["block"] == 1
    assert all(each["fitted"] < each["mean"] for each in fit["matrices"])
    each_passed = [passed(original, cut, index) for index in group]
    for place, note in enumerate(fit["matrices"]):
        rows = []
        for index, (read, out, weights) in zip(group, each_passed, strict=True):
            if place + 1 < len(fit["matrices"]):  # what the block's own matrix puts out
                out = original.blocks[index].ffn.matrices[place].module(read)
            else:
                read = decoder.blocks[index].ffn.neurons(read)
            rows.append((read, out, weights))
        whole = tuple(torch.cat(each) for each in zip(*rows, strict=True))
        matrices = [original.blocks[index].ffn.matrices[place] for index in group]
        mean = torch.stack([joined(each) for each in matrices]).mean(0)
        expected = regressed(whole, mean, note["ridge"], biased=matrices[0].bias is not None)  # type: ignore[arg-type]
        for index in group:
            found = joined(decoder.blocks[index].ffn.matrices[place])
            assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


def test_permuted_copies_are_fitted_by_one_of_them(family: str) -> None:
    decoder = permuted_copies(family)
    before = logits(decoder)
    Merge(n=BLOCKS, average="fitted").apply(decoder, Calibration(decoder, windows()))
    assert (logits(decoder) - before).abs().max() < 1e-4


def test_a_fitted_block_does_what_its_whole_group_did(family: str) -> None:
    decoder = tiny(family).decoder
    two, last = decoder.blocks[1:3]
    last.ffn.copy_(two.ffn.tensors())
    for part in ("attention", "ffn"):  # it adds nothing
        for tensor in last.output(part).tensors:  # type: ignore[union-attr]
            tensor.zero_()
    before, calibration = logits(decoder), Calibration(decoder, windows())
    errors = {}
    for average in ("mean", "fitted"):
        other = decoder.copy()
        Collapse(groups="1-2", align="none", average=average).apply(other, calibration)  # type: ignore[arg-type]
        errors[average] = float((logits(other) - before).abs().max())
    assert errors["fitted"] < 0.02 * errors["mean"]


@METHOD
def test_groups_are_fitted_one_after_the_other(method: type[Merge | Collapse]) -> None:
    decoder, cut = tiny("qwen2").decoder, windows()
    after = decoder.copy()
    method(groups="0-1,2-3", align="none", average="fitted").apply(decoder, Calibration(decoder, cut))
    method(groups="0-1", align="none", average="fitted").apply(after, Calibration(after, cut))
    rest = "1-2" if method is Collapse else "2-3"
    method(groups=rest, align="none", average="fitted").apply(after, Calibration(after, cut))
    assert (logits(decoder) - logits(after)).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["gpt2", "opt", "phi3", "gemma2", "gptj", "granite"])
@METHOD
def test_a_fitted_average_misses_less_than_the_mean_in_every_kind_of_family(
    method: type[Merge | Collapse], family: str
) -> None:
    decoder = tiny(family).decoder
    notes = method(n=2, average="fitted").apply(decoder, Calibration(decoder, windows()))
    matrices = [each for fit in notes["fits"] for each in fit["matrices"]]
    said = [line for line in method.told({}, notes) if "fitted" in line]
    assert re.fullmatch(r"block  0: its fitted FFN misses [\d.]+% of what it should put out, the mean [\d.]+%", said[0])
    assert len(notes["fits"]) == 2
    assert all(each["fitted"] <= each["mean"] for each in matrices)
    assert all((each["ridge"] is None) == (each["fitted"] == each["mean"]) for each in matrices)
    assert logits(decoder).isfinite().all()


@METHOD
def test_a_fit_without_enough_text_or_with_states_that_overflow_is_refused(method: type[Merge | Collapse]) -> None:
    decoder, cut = tiny("gpt2").decoder, windows()
    asked = method(n=2, align="none", average="fitted")
    with unchanged(decoder), refused(InputError, "calibration text of 1 window; accepted: 2 or more"):
        asked.apply(
            decoder, Calibration(decoder, cut_windows(corpus(), tokenizer(), context=CONTEXT, limit_tokens=CONTEXT))
        )
    with unchanged(decoder), refused(InputError, "average 'fitted' needs calibration text; give a corpus$"):
        asked.apply(decoder, None)
    decoder.blocks[0].ffn.up.weight.fill_(1e20)
    with unchanged(decoder), refused(ModelError, "blocks 0 to 1 read or put out is not finite"):
        asked.apply(decoder, Calibration(decoder, cut))


def test_records_of_the_mean_stay_what_they_were() -> None:
    for method in (Merge, Collapse):
        assert "average" not in method(n=2).to_json()[method.name]
        assert "average" not in method(n=2).resolved(deep(4))
        assert "average" not in method(n=2).settings()
        assert method(n=2, average="fitted").to_json()[method.name]["average"] == "fitted"
        assert method(n=2, average="fitted").resolved(deep(4))["average"] == "fitted"
        assert method(n=2, average="fitted").settings()["average"] == "fitted"


@pytest.mark.parametrize(
    ("settings", "n_blocks", "spelled"),
    [
        ({"n": 2}, 12, "0-1,2-3,4-5,6-7,8-9,10-11"),
        ({"n": 5}, 12, "0-4,5-9,10-11"),
        ({"n": 11}, 12, "0-10"),  # a last group of one is no group
        ({"n": 12}, 12, "0-11"),
        ({"groups": "1-4,5-8"}, 12, "1-4,5-8"),
        ({"groups": " 5-8 , 1-2 "}, 12, "1-2,5-8"),
        ({"groups": "0-3"}, 4, "0-3"),
    ],
)
@METHOD
def test_groups_are_spelled_out(method: type[Merge], settings: dict[str, Any], n_blocks: int, spelled: str) -> None:
    resolved = method(**settings).resolved(deep(n_blocks))
    assert resolved["groups"] == spelled
    assert resolved["name"] == method.name


def test_two_spellings_of_the_same_groups_resolve_alike() -> None:
    assert Merge(n=2).resolved(deep(4)) == Merge(groups="0-1,2-3").resolved(deep(4))
    assert Merge(n=2).resolved(deep(4)) != Merge(n=2, tie=True).resolved(deep(4))
    assert Collapse(n=2).resolved(deep(4)) != Collapse(n=2, anchor="last").resolved(deep(4))


@pytest.mark.parametrize(("anchor", "index"), [("first", 3), ("middle", 4), ("last", 6)])
def test_the_anchor_is_named_by_place(anchor: Any, index: int) -> None:
    assert Merge(n=2, anchor=anchor).anchor_of(range(3, 7)) == index


@pytest.mark.parametrize(
    ("settings", "received", "accepted"),
    [
        ({"n": 1}, "n 1", "2"),
        ({"n": 0}, "n 0", "2"),
        ({"n": -3}, "n -3", "2"),
        ({}, "n None and groups None", "one of the two"),
        ({"n": 2, "groups": "0-1"}, "n 2 and groups '0-1'", "one of the two"),
        ({"n": 1, "groups": "auto"}, "n 1", "2"),
        ({"groups": "atuo"}, "'atuo'; did you mean 'auto'?", "auto, or first-last"),
        ({"groups": "AUTO"}, "'AUTO'; did you mean 'auto'?", "auto, or first-last"),
        ({"groups": "auto,1-2"}, "'auto,1-2'", "auto, or first-last"),
        ({"groups": "3-1"}, "'3-1'", "first-last"),
        ({"groups": "2-2"}, "'2-2'", "two or more"),
        ({"groups": "a-b"}, "'a-b'", "first-last"),
        ({"groups": "1"}, "'1'", "first-last"),
        ({"groups": ""}, "''", "first-last"),
        ({"groups": "1-2,"}, "''", "first-last"),
        ({"groups": "1--2"}, "'1--2'", "first-last"),
        ({"groups": "1-3,3-4"}, "'1-3,3-4'", "name block 3 twice"),
        ({"groups": "0-5,1-2"}, "'0-5,1-2'", "name block 1 twice"),
        ({"n": 2, "align": "greedy"}, "align 'greedy'", "hungarian, none"),
        ({"n": 2, "anchor": "second"}, "anchor 'second'", "first, middle, last"),
        ({"n": 2, "average": "median"}, "average 'median'", "mean, fitted"),
    ],
)
@METHOD
def test_a_wrong_setting_says_what_was_received_and_what_is_accepted(
    method: type[Merge], settings: dict[str, Any], received: str, accepted: str
) -> None:
    with refused(InputError, re.escape(received), says=accepted):
        method(**settings)


@METHOD
def test_groups_that_are_to_be_searched_stay_auto_with_their_size(method: type[Merge | Collapse]) -> None:
    assert method(groups="auto").resolved(deep(4)) == method(groups="auto", n=2).resolved(deep(4))
    assert method(groups="auto").resolved(deep(4)) | {"groups": "0-1,2-3"} == method(n=2).resolved(deep(4)) | {"n": 2}
    assert method(groups="auto", n=3).resolved(deep(4)) != method(groups="auto").resolved(deep(4))
    with pytest.raises(InputError, match=r"n 5 for a model of 4 blocks; accepted: 2 \.\.\. 4"):
        method(groups="auto", n=5).resolved(deep(4))
    for settings in ({"groups": "auto"}, {"n": 2}):
        with pytest.raises(InputError, match="n 2 for a model of 1 block, which has none to be grouped with"):
            method(**settings).resolved(deep(1))
    with pytest.raises(InputError, match="groups auto, and nothing has searched for them"):
        method(groups="auto", align="none").apply(deep(4), None)


@pytest.mark.parametrize("settings", [{"n": BLOCKS + 1}, {"groups": "0-9"}, {"groups": f"1-{BLOCKS}"}])
@METHOD
def test_a_setting_beyond_the_depth_is_refused_before_anything_is_edited(
    method: type[Merge], settings: dict[str, Any]
) -> None:
    decoder = tiny("gpt2").decoder
    for act in (
        lambda: method(**settings).resolved(deep(BLOCKS)),
        lambda: method(**settings, align="none").apply(decoder, None),
    ):
        said = r"for a model of (4 blocks; accepted: 2 \.\.\. 4|blocks 0 \.\.\. 3)"
        with unchanged(decoder), pytest.raises(InputError, match=said):
            act()


@METHOD
def test_aligning_without_calibration_text_is_refused(method: type[Merge]) -> None:
    assert method(n=2).needs_calibration
    assert not method(n=2, align="none").needs_calibration
    with pytest.raises(InputError, match="needs calibration text"):
        method(n=2).apply(tiny("gpt2").decoder, None)


@pytest.mark.parametrize("align", ["hungarian", "none"])
@METHOD
def test_ffns_of_different_widths_have_no_average(method: type[Merge | Collapse], align: Any) -> None:
    decoder = tiny("gpt2").decoder
    decoder.keep_neurons_({1: torch.arange(7)})
    said = "blocks 0 and 1 have 128 and 7 neurons; accepted: as many"
    with unchanged(decoder), pytest.raises(InputError, match=said):
        method(groups="0-1", align=align).apply(decoder, Calibration(decoder, windows()))
