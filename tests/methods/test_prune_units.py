"""Pruning neurons and heads by one ranking, and neurons alone by the same."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning import CUT, HEADS, NEURONS, fresh, prune
from tiny import BLOCKS, FAMILY_NAMES, base, continued, halve_, logits, tiny

import layerfold
from layerfold import calibration
from layerfold.calibration import Calibration
from layerfold.errors import InputError
from layerfold.evaluators.size import flops_per_token
from layerfold.inference.sensitivity import Sensitivities, sensitivities
from layerfold.methods import Drop, Merge, Prune, Steps
from layerfold.methods.prune.units import Sublayer, removable, sublayers, thin_
from layerfold.model.decoder import Decoder
from layerfold.model.masks import held

SCOPES = ("global", "matrix")


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
    decoder = fresh("gpt2")
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
    decoder = fresh("llama")
    Merge(groups="1-2", align="none", tie=True).apply(decoder, None)
    decoder.remove_("ffn", [3])
    decoder.remove_("attention", [0, 2])
    found = sublayers(decoder)
    assert [(each.part, each.blocks) for each in found] == [
        *(("ffn", (0,)), ("ffn", (1, 2))),
        *(("attention", (1,)), ("attention", (3,))),
    ]


def test_zeros_are_left_out_of_the_count_where_asked() -> None:
    decoder = fresh("gpt2")
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
    decoder = fresh(family)
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
    decoder = fresh(family)
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
    decoder = fresh("gpt2")
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
    decoder = fresh("gpt2")
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
    decoder = fresh(family)
    Merge(groups="1-2", align="none", tie=True).apply(decoder, None)
    before, amount = decoder.size().parameters, removable(sublayers(decoder)) // 2
    thin_(decoder, amount, Calibration(decoder, CUT))
    one, two = (decoder.blocks[index].ffn for index in (1, 2))
    assert all(a.module.weight is b.module.weight for a, b in zip(one.matrices, two.matrices, strict=True))
    assert before - decoder.size().parameters >= amount
    assert torch.isfinite(logits(decoder)).all()


def test_every_ffn_can_lose_all_but_its_largest_neuron() -> None:
    found = [Sublayer("ffn", (0,), torch.tensor([3, 9, 5])), Sublayer("attention", (0,), torch.tensor([7, 7]))]
    assert removable(found) == 8 + 14


# The method: settings


def test_settings_resolve_to_a_number_of_parameters() -> None:
    decoder = fresh("gpt2")
    whole, size = 4 * (128 * 65 + 4 * 1048), 60_320
    assert Prune(sparsity=0.3, **HEADS).resolved(decoder) == {
        **{"name": "prune", "criterion": "taylor", "structure": "neurons+heads", "scope": "global"},
        **{"parameters": whole, "removed": round(0.3 * whole)},
    }
    alike = [
        Prune(**settings, **HEADS).resolved(decoder)
        for settings in (
            {"sparsity": 1000 / whole},
            {"nonzero": size - 1000},
            {"nonzero": size - 1000, "scope": "global"},
            {"nonzero": f"{size - 1000:,}", "parts": "ffn, attention"},
        )
    ]
    assert all(each == alike[0] for each in alike)
    assert alike[0]["removed"] == 1000
    assert json.loads(json.dumps(alike[0])) == alike[0]
    assert Prune(sparsity=0.3, **NEURONS).resolved(decoder)["scope"] == "matrix"


# Budgets


def test_a_share_of_the_parameters_of_units_goes(family: str) -> None:
    decoder, share = fresh(family), 0.5
    before, wanted = parameters(decoder), Prune(sparsity=share, **HEADS).resolved(decoder)["removed"]
    notes = prune(decoder, sparsity=share, **HEADS)
    assert wanted == round(share * before)
    assert 0 <= before - parameters(decoder) - wanted < 2000
    assert (notes["neurons_left"], notes["heads_left"]) == (list(decoder.d_ffn), list(decoder.heads))
    assert "every kernel profits" in notes["speed"]
    assert continued(decoder) == continued(decoder, use_cache=False)


@pytest.mark.parametrize("masked", [False, True])
def test_a_budget_of_what_is_not_zero_is_met_and_not_exceeded(family: str, masked: bool) -> None:
    decoder = fresh(family)
    if masked:
        halve_(decoder)
    budget = int(0.8 * decoder.size().nonzero)
    prune(decoder, nonzero=budget, **HEADS)
    assert 0 <= budget - decoder.size().nonzero < 200
    weights = dict(decoder.model.named_parameters())
    assert bool(held(decoder)) == masked
    assert all(torch.equal(mask, weights[name] != 0) for name, mask in held(decoder).items())


def test_both_ends_of_the_reachable_range() -> None:
    decoder = fresh("llama")
    size, most = decoder.size(), removable(sublayers(decoder))
    least = size.nonzero - most
    for beyond in (size.nonzero + 1, least - 1, "10%"):
        with pytest.raises(InputError, match=rf"accepted: {least:,} \.\.\. {size.nonzero:,}$"):
            prune(decoder, nonzero=beyond, **HEADS)
    with pytest.raises(InputError, match=r"sparsity 0.999 leaves an FFN without neurons; accepted: 0 \.\.\. 0.98"):
        prune(decoder, sparsity=0.999, **HEADS)
    assert decoder.size() == size
    prune(decoder, nonzero=least, **HEADS)
    assert (decoder.d_ffn, decoder.heads) == ((1,) * BLOCKS, (0,) * BLOCKS)
    assert decoder.size().nonzero <= least  # with the last head its norm goes, and the bias of the output
    assert torch.isfinite(logits(decoder)).all()


def test_the_largest_share_that_is_told_is_accepted(family: str) -> None:
    decoder = fresh(family)
    with pytest.raises(InputError) as caught:
        Prune(sparsity=0.9999, **HEADS).resolved(decoder)
    most = float(str(caught.value).rsplit(" ", 1)[1])
    found = sublayers(decoder)
    assert 0 <= removable(found) - Prune(sparsity=most, **HEADS).resolved(decoder)["removed"] <= 1


@pytest.mark.parametrize("part", ["attention", "ffn"])
def test_a_model_without_any_of_one_kind_loses_the_other(part: Any) -> None:
    decoder = fresh("gpt2")
    Drop(blocks="0-3", part=part).apply(decoder, None)
    before = parameters(decoder)
    prune(decoder, sparsity=0.5, **HEADS)
    assert parameters(decoder) <= before / 2
    assert not any(decoder.heads if part == "attention" else decoder.d_ffn)


def test_operations_are_those_of_the_heads_that_are_left() -> None:
    decoder = fresh("qwen3")
    whole = flops_per_token(decoder, 9)
    decoder.keep_heads_({1: torch.tensor([0])})
    # A group: two query heads of 16 channels, a key and a value head. Scores and sums over (1 + ... + 9) / 9 positions.
    matrices = 32 * (2 * 16) + 2 * 32 * 16 + (2 * 16) * 32
    assert whole - flops_per_token(decoder, 9) == 2 * matrices + 4 * (2 * 16) * 5


# Neurons alone


@pytest.mark.parametrize("scope", SCOPES)
def test_neurons_go_that_the_loss_misses_least(family: str, scope: str) -> None:
    decoder = fresh(family)
    Merge(groups="1-2", align="none", tie=True).apply(decoder, None)
    before, felt = decoder.copy(), sensitivities(decoder, CUT).neurons
    felt[1] = felt[2] = felt[1] + felt[2]
    notes = prune(decoder, sparsity=0.5, scope=scope, **NEURONS)
    width = before.d_ffn[0]
    assert notes["neurons_left"] == list(decoder.d_ffn)
    assert sum(decoder.d_ffn[index] for index in (0, 1, 3)) == 3 * width - round(0.5 * 3 * width)
    assert decoder.heads == before.heads
    lost, kept = [], []
    for index in (0, 1, 3):
        best = felt[index].argsort(descending=True)[: decoder.d_ffn[index]].sort().values
        assert torch.equal(decoder.blocks[index].ffn.up.weight, before.blocks[index].ffn.up.weight[best])
        ordered = felt[index].sort().values
        lost += ordered[: width - len(best)].tolist()
        kept += ordered[width - len(best) : -1].tolist()  # the best stays in any case
    if scope == "matrix":
        assert set(decoder.d_ffn) == {width // 2}
    else:
        assert max(lost) <= min(kept) * (1 + 1e-6)
        assert len(set(decoder.d_ffn)) > 1


@pytest.mark.parametrize("scope", SCOPES)
def test_neurons_alone_meet_a_budget(scope: str) -> None:
    decoder = fresh("gpt2")
    prune(decoder, nonzero=60_320 - 65 * 100, scope=scope, **NEURONS)
    assert decoder.size().nonzero == 60_320 - 65 * 100


# With other steps


@pytest.mark.parametrize("way", [HEADS, NEURONS], ids=["heads", "neurons"])
def test_what_is_left_is_repaired(way: dict[str, Any], study_corpus: str) -> None:
    text = {"corpus": study_corpus, "tokens": 300, "repair_tokens": 600}
    method = Steps((Drop(blocks="1"), Prune(sparsity=0.5, **way)))
    made = layerfold.compress(tiny("gpt2"), method, repair="refit+attention", **text)
    drop, pruned, repair = made.provenance.steps
    assert [step["method"]["name"] for step in (drop, pruned, repair)] == ["drop", "prune", "repair"]
    assert [each["block"] for each in repair["notes"]["repaired"]] == [0, 1, 2]
    assert all(each["repaired"] <= each["error"] for each in repair["notes"]["repaired"])
    alone = tiny("gpt2").decoder
    alone.keep_([0, 2, 3])
    assert pruned["method"] == Prune(sparsity=0.5, **way).resolved(alone)
    assert list(made.decoder.d_ffn) == pruned["notes"]["neurons_left"]
    if way == HEADS:
        assert list(made.decoder.heads) == pruned["notes"]["heads_left"]
        assert sum(made.decoder.heads) < 12
