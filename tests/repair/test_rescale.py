"""What neurons are given after a rescaling, against plain forward passes of the original."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from passes import applied
from tiny import logits, tiny, windows
from torch import Tensor

from layerfold.calibration import Calibration
from layerfold.errors import InputError, ModelError
from layerfold.methods import Collapse, Drop, Merge
from layerfold.model.decoder import Decoder
from layerfold.repair.rescale import Sources, rescale_
from layerfold.text.windows import TokenWindows

Array = NDArray[np.float64]
CUT = windows()


@torch.no_grad()
def given(decoder: Decoder, cut: TokenWindows = CUT) -> dict[tuple[int, int], Array]:
    """By block and matrix, `up` and then `gate`, what neurons are given: (tokens, d_ffn), without any padding."""
    rows: dict[tuple[int, int], list[Tensor]] = {}
    handles = []
    for index, width in enumerate(decoder.d_ffn):
        for place, matrix in enumerate(decoder.blocks[index].ffn.matrices[:-1] if width else ()):
            into = rows.setdefault((index, place), [])
            handles.append(
                matrix.module.register_forward_hook(lambda _, inputs, output, into=into: into.append(output[0]))
            )
    for ids, length in zip(cut.input_ids, cut.lengths, strict=True):
        decoder.model(input_ids=ids[None, :length])
    for handle in handles:
        handle.remove()
    return {key: torch.cat(each).double().numpy() for key, each in rows.items()}


def both(rows: Array) -> tuple[Array, Array]:
    return rows.mean(0), rows.std(0)


def expected(original: Decoder, members: Any, place: int) -> tuple[Array, Array]:
    """Means over the members of a neuron's mean and of its deviation."""
    before = given(original)
    each = []
    for block, match in members:
        rows = before[block, place] if match is None else before[block, place][:, match.order.numpy()]
        flipped = match is not None and match.signs is not None and place == 0  # `up` comes first
        each.append(both(rows * match.signs.numpy() if flipped else rows))
    return np.mean([mean for mean, _ in each], axis=0), np.mean([deviation for _, deviation in each], axis=0)


def assert_given(found: tuple[Array, Array], should: tuple[Array, Array], biased: bool) -> None:
    assert found[1] == pytest.approx(should[1], rel=2e-3)
    if biased:
        assert found[0] == pytest.approx(should[0], abs=1e-3 * should[1].max())


WAYS: dict[str, Callable[[], Any]] = {
    "merge": lambda: Merge(n=2),
    "merge of one group": lambda: Merge(groups="1-3", anchor="middle", align="none"),
    "collapse to the first": lambda: Collapse(n=2, anchor="first"),
    "collapse to the middle": lambda: Collapse(groups="0-2", anchor="middle"),
    "collapse to the last": lambda: Collapse(n=2, anchor="last"),
    "collapse of plain neurons": lambda: Collapse(n=3, anchor="last", align="none"),
}


@pytest.mark.parametrize(
    ("family", "way"),
    [
        *((family, way) for family in ("gpt2", "llama") for way in WAYS),
        *((each, "merge") for each in ("mistral", "qwen3")),
    ],
)
def test_neurons_are_given_the_mean_of_what_their_members_were(way: str, family: str) -> None:
    original, method = tiny(family).decoder, WAYS[way]()
    calibration = Calibration(original, CUT)
    sources: Sources = method.members(original, calibration)
    decoder = original.copy()
    kept = applied(decoder, method, calibration=Calibration(original, CUT))
    here = {new: sources[old] for new, old in enumerate(kept) if old in sources}
    shrunk = given(decoder)
    told = rescale_(decoder, original, here, CUT)
    assert [each.block for each in told] == sorted(here)
    after = given(decoder)
    biased = decoder.blocks[0].ffn.up.bias is not None
    for (index, place), rows in after.items():
        if index in here:
            assert_given(both(rows), expected(original, here[index], place), biased)
        elif index < min(here):
            assert rows == pytest.approx(shrunk[index, place])
    first = min(here)  # what it is given is not changed by blocks before it
    ratios = [shrunk[first, place].std(0) / after[first, place].std(0) for _, place in after if (first, place) in after]
    assert told[0].shrunk == pytest.approx(np.mean(ratios), rel=1e-3)
    assert told[0].shrunk < 0.95, "averages deviate less"
    assert torch.equal(logits(original), logits(tiny(family).decoder))


def test_members_are_a_groups_blocks_in_the_order_of_the_anchors_neurons() -> None:
    original = tiny("llama").decoder
    method = Collapse(groups="0-2", anchor="middle")
    calibration = Calibration(original, CUT)
    found = method.members(original, calibration)
    assert list(found) == [0, 1, 2]
    matches = calibration.matches([(1, 0), (1, 2)])
    for each in found.values():
        assert [block for block, _ in each] == [0, 1, 2]
        assert each[1][1] is None
        for block in (0, 2):
            match = each[block][1]
            assert match is not None
            assert match is matches[1, block]
            assert not torch.equal(match.order, torch.arange(len(match.order)))


def test_ffns_that_are_one_are_given_the_mean_on_average(family: str) -> None:
    original = tiny(family).decoder
    decoder = original.copy()
    method = Merge(groups="1-2", align="none", tie=True)
    method.apply(decoder, None)
    reads: dict[int, list[Tensor]] = {1: [], 2: []}
    handles = [
        decoder.blocks[index].ffn.module.register_forward_pre_hook(
            lambda _, inputs, index=index: reads[index].append(inputs[0][0])
        )
        for index in reads
    ]
    given(decoder)
    for handle in handles:
        handle.remove()
    told = rescale_(decoder, original, method.members(original, None), CUT)
    assert [each.block for each in told] == [1, 2]
    assert told[0].shrunk == told[1].shrunk
    assert decoder.blocks[1].ffn.up.module.weight is decoder.blocks[2].ffn.up.module.weight
    for place, matrix in enumerate(decoder.blocks[1].ffn.matrices[:-1]):
        with torch.no_grad():
            each = [both(matrix.module(torch.cat(rows)).double().numpy()) for rows in reads.values()]
        found = np.mean([mean for mean, _ in each], axis=0), np.mean([deviation for _, deviation in each], axis=0)
        assert_given(found, expected(original, [(1, None), (2, None)], place), matrix.bias is not None)


@pytest.mark.parametrize("drop", [Drop(blocks="1"), Drop(blocks="0"), Drop(blocks="1", part="attention")], ids=str)
def test_after_a_drop_neurons_are_given_what_they_were(drop: Drop, family: str) -> None:
    original = tiny(family).decoder
    decoder = original.copy()
    kept = applied(decoder, drop)
    rescale_(decoder, original, {new: [(old, None)] for new, old in enumerate(kept)}, CUT)
    after, was = given(decoder), given(original)
    for (index, place), rows in after.items():
        assert_given(both(rows), both(was[kept[index], place]), decoder.blocks[0].ffn.up.bias is not None)


def test_only_the_first_matrices_change(family: str) -> None:
    original = tiny(family).decoder
    decoder = original.copy()
    Drop(blocks="1").apply(decoder, None)
    before = decoder.copy()
    rescale_(decoder, original, {1: [(2, None)]}, CUT)
    old, new = (dict(each.model.named_parameters()) for each in (before, decoder))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    ffn = [name for name in old if ".1.mlp." in name and not any(part in name for part in ("down_proj", "c_proj"))]
    assert changed == set(ffn)


def test_neurons_that_are_always_given_the_same_are_shifted_and_not_scaled() -> None:
    original = tiny("gpt2").decoder
    decoder = original.copy()
    # An FFN that reads a constant: what its neurons are given deviates by rounding alone.
    norm: Any = decoder.blocks[1].module.ln_2
    with torch.no_grad():
        norm.weight.zero_()
        norm.bias.mul_(100)
    before = decoder.blocks[1].ffn.up.weight.clone()
    told = rescale_(decoder, original, {1: [(1, None)]}, CUT)
    assert torch.equal(decoder.blocks[1].ffn.up.weight, before)
    mean, _ = both(given(decoder)[1, 0])
    assert mean == pytest.approx(both(given(original)[1, 0])[0], abs=2e-3)
    assert told[0].shrunk == 1


def test_padding_is_ignored() -> None:
    original = tiny("mistral").decoder
    other = replace(CUT, input_ids=CUT.input_ids.clone())
    other.input_ids[-1, int(CUT.lengths[-1]) :] = 9
    found = []
    for cut in (CUT, other):
        decoder = original.copy()
        Drop(blocks="1").apply(decoder, None)
        rescale_(decoder, original, {1: [(2, None)]}, cut)
        found.append(logits(decoder))
    assert torch.equal(*found)


@pytest.mark.parametrize("spoilt", [0, 1])
def test_activations_that_are_not_finite_are_an_error(spoilt: int, family: str) -> None:
    each = [tiny(family).decoder, tiny(family).decoder]
    each[spoilt].blocks[0].module.mlp.register_forward_hook(lambda _, inputs, output: output + float("nan"))
    with pytest.raises(ModelError, match=r"^activations on the calibration text are not finite$"):
        rescale_(each[1], each[0], {2: [(2, None)]}, CUT)


def test_without_calibration_text_there_are_no_aligned_members() -> None:
    with pytest.raises(InputError, match="align 'hungarian' needs calibration text"):
        Merge(n=2).members(tiny("gpt2").decoder, None)
