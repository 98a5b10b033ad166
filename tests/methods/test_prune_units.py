"""Neurons and heads that go by one ranking over both."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import BLOCKS, FAMILY_NAMES, base, continued, logits, unchanged, windows

from layerfold import calibration
from layerfold.calibration import Calibration
from layerfold.inference.sensitivity import Sensitivities, sensitivities
from layerfold.methods import Merge
from layerfold.methods.prune.units import Sublayer, removable, sublayers, thin_
from layerfold.model.decoder import Decoder

CUT = windows(limit_tokens=60)


def parameters(decoder: Decoder) -> int:
    """How many go with neurons and heads."""
    return sum(int(each.sizes.sum()) for each in sublayers(decoder))


def felt(decoder: Decoder, neurons: float = 1.0, heads: float = 1.0) -> Sensitivities:
    """Sensitivities that grow with the number of the unit, the same in all blocks."""
    return Sensitivities(
        {i: neurons * torch.arange(1.0, width + 1).double() for i, width in enumerate(decoder.d_ffn) if width},
        {i: heads * torch.arange(1.0, groups + 1).double() for i, groups in enumerate(decoder.heads) if groups},
    )


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Decoder:
    """A decoder of which neurons are felt little, heads much."""
    decoder = base("gpt2").copy()
    known = felt(decoder, 1e-6, 1.0)
    monkeypatch.setattr(calibration, "sensitivities", lambda *_: known)
    return decoder


# What is counted


def test_units_of_a_tiny_gpt2_by_hand() -> None:
    found = sublayers(base("gpt2"))
    assert [(each.part, each.blocks) for each in found] == [
        *(("ffn", (index,)) for index in range(BLOCKS)),
        *(("attention", (index,)) for index in range(BLOCKS)),
    ]
    for each in found:  # a column, a row and a bias; three times eight of both, with biases, and eight rows
        assert each.sizes.tolist() == ([65] * 128 if each.part == "ffn" else [3 * 8 * 33 + 8 * 32] * 4)
    assert removable(found) == 4 * (127 * 65 + 4 * 1048)


def test_tied_ffns_are_one_and_what_is_gone_is_none() -> None:
    decoder = base("llama").copy()
    Merge(groups="1-2", align="none", tie=True).apply(decoder, None)
    decoder.remove_("ffn", [3])
    decoder.remove_("attention", [0, 2])
    found = sublayers(decoder)
    assert [(each.part, each.blocks) for each in found] == [
        *(("ffn", (0,)), ("ffn", (1, 2))),
        *(("attention", (1,)), ("attention", (3,))),
    ]


def test_zeros_are_left_out_of_the_count_where_asked() -> None:
    decoder = base("gpt2").copy()
    decoder.blocks[1].ffn.up.weight[5] = 0
    decoder.blocks[2].attention.inputs[0].weight[32 + 8 : 32 + 16] = 0  # the keys of head 1
    whole, left = sublayers(decoder), sublayers(decoder, nonzero=True)
    fewer = [(one.sizes - two.sizes) for one, two in zip(whole, left, strict=True)]
    assert [each.nonzero().flatten().tolist() for each in fewer] == [[], [5], [], [], [], [], [1], []]
    assert (fewer[1].sum(), fewer[6].sum()) == (32, 8 * 32)


# What goes


@settings(max_examples=12, deadline=None)
@given(family=st.sampled_from(FAMILY_NAMES), share=st.floats(0, 1))
def test_as_much_goes_as_is_asked_and_little_more(family: str, share: float) -> None:
    decoder = base(family).copy()
    before, size = sublayers(decoder), decoder.size().parameters
    amount = round(share * removable(before))
    thin_(decoder, amount, Calibration(decoder, CUT))
    gone = sum(int(each.sizes.sum()) for each in before) - parameters(decoder)
    # The last to go is a neuron, and where there was none left to go, a group of heads.
    more = max(int(each.sizes.max()) for each in before if max(decoder.d_ffn) == 1 or each.part == "ffn")
    assert amount <= gone < amount + more
    assert min(decoder.d_ffn) >= 1
    assert size - decoder.size().parameters >= gone
    assert torch.isfinite(logits(decoder)).all()
    assert continued(decoder) == continued(decoder, use_cache=False)


def test_those_go_that_the_loss_misses_least_for_their_size(family: str) -> None:
    decoder = base(family).copy()
    found, known = sublayers(decoder), sensitivities(decoder, CUT)
    rated: list[tuple[float, str, int, int, int]] = []
    for each in found:
        scores = (known.neurons if each.part == "ffn" else known.heads)[each.blocks[0]] / each.sizes
        best = int(scores.argmax()) if each.part == "ffn" else -1
        for unit, score in enumerate(scores.tolist()):
            if unit != best:
                rated.append((score, each.part, each.blocks[0], unit, int(each.sizes[unit])))
    amount = removable(found) // 2
    expected: dict[tuple[str, int], set[int]] = {}
    left, least = amount, min(size for *_, size in rated)
    for _, part, block, unit, size in sorted(rated):
        if left > 0 and size <= max(left, least):
            expected.setdefault((part, block), set()).add(unit)
            left -= size
    before = decoder.copy()
    thin_(decoder, amount, Calibration(decoder, CUT))
    for index in range(BLOCKS):
        gone = expected.get(("ffn", index), set())
        kept = [unit for unit in range(before.d_ffn[index]) if unit not in gone]
        assert torch.equal(decoder.blocks[index].ffn.up.weight, before.blocks[index].ffn.up.weight[kept])
        groups = [unit for unit in range(before.heads[index]) if unit not in expected.get(("attention", index), set())]
        assert decoder.heads[index] == len(groups)
        if groups:
            units = zip(decoder.blocks[index].attention.units, before.blocks[index].attention.units, strict=True)
            assert all(torch.equal(now, was[groups]) for now, was in units)


def test_a_group_of_heads_larger_than_what_is_left_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = base("gpt2").copy()
    known = felt(decoder, 1.0, 1e-6)
    monkeypatch.setattr(calibration, "sensitivities", lambda *_: known)
    thin_(decoder, 2 * 1048 + 200, Calibration(decoder, CUT))
    assert decoder.heads == (3, 3, 4, 4)
    assert sum(decoder.d_ffn) == 4 * 128 - 4  # 260, the least number of neurons that is 200


# All neurons but one of each FFN, that and a little more, everything: then a head goes, or all attention.
@pytest.mark.parametrize("heads", [(4, 4, 4, 4), (3, 4, 4, 4), (0, 0, 0, 0)])
def test_each_ffn_keeps_the_neuron_that_would_be_missed_most(heads: tuple[int, ...], told: Decoder) -> None:
    rows = [block.ffn.up.weight[-1].clone() for block in told.blocks]
    amount = 4 * 127 * 65 + (heads[0] == 3)
    thin_(told, amount if heads[0] else removable(sublayers(told)), Calibration(told, CUT))
    assert told.d_ffn == (1,) * BLOCKS
    assert told.heads == heads
    assert all(torch.equal(block.ffn.up.weight[0], row) for block, row in zip(told.blocks, rows, strict=True))
    assert told.removed_parts == {"attention": () if heads[0] else (0, 1, 2, 3), "ffn": ()}
    assert torch.isfinite(logits(told)).all()
    assert continued(told) == continued(told, use_cache=False)


def test_a_neuron_that_holds_little_lets_no_heads_go_in_place_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = base("gpt2").copy()
    known = felt(decoder, 1.0, 1e-6)
    monkeypatch.setattr(calibration, "sensitivities", lambda *_: known)
    # A neuron of one weight: all other units are larger than it, and than what is left to go.
    ffn = decoder.blocks[0].ffn
    for tensor in (ffn.up.weight[0], ffn.up.bias[:1], ffn.down.weight[:, 0]):  # type: ignore[index]
        tensor.zero_()
    ffn.up.weight[0, 0] = 1.0
    thin_(decoder, 30, Calibration(decoder, CUT), nonzero=True)
    assert decoder.heads == (4,) * BLOCKS
    assert sum(decoder.d_ffn) in (BLOCKS * 128 - 1, BLOCKS * 128 - 2)


def test_tied_ffns_are_thinned_as_one(family: str) -> None:
    decoder = base(family).copy()
    Merge(groups="1-2", align="none", tie=True).apply(decoder, None)
    before, amount = decoder.size().parameters, removable(sublayers(decoder)) // 2
    thin_(decoder, amount, Calibration(decoder, CUT))
    one, two = (decoder.blocks[index].ffn for index in (1, 2))
    assert all(a.module.weight is b.module.weight for a, b in zip(one.matrices, two.matrices, strict=True))
    assert before - decoder.size().parameters >= amount
    assert torch.isfinite(logits(decoder)).all()


def test_a_second_time_goes_on_from_the_first(family: str) -> None:
    decoder = base(family).copy()
    for _ in range(2):
        before, amount = parameters(decoder), parameters(decoder) // 4
        thin_(decoder, amount, Calibration(decoder, CUT))
        assert before - parameters(decoder) >= amount


def test_a_copy_that_shares_parameters_is_thinned_alone(family: str) -> None:
    decoder = base(family).copy()
    before, heads, widths = logits(decoder), decoder.heads, decoder.d_ffn
    with unchanged(decoder):
        thin_(decoder.copy(share=True), parameters(decoder) // 2, Calibration(decoder, CUT))
    assert (decoder.heads, decoder.d_ffn) == (heads, widths)
    assert torch.equal(logits(decoder), before)


def test_every_ffn_can_lose_all_but_its_largest_neuron() -> None:
    found = [Sublayer("ffn", (0,), torch.tensor([3, 9, 5])), Sublayer("attention", (0,), torch.tensor([7, 7]))]
    assert removable(found) == 8 + 14
