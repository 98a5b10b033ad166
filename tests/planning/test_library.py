"""The library of a plan: its versions pass text through as the models that `Thin` makes, and what it chooses."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping

import pytest
import torch
from tiny import BLOCKS, tiny, unchanged, windows

from layerfold.calibration import Calibration
from layerfold.checkpoint.weighing import parameters
from layerfold.inference.scoring import window_nats
from layerfold.methods import Thin
from layerfold.methods.thin.versions import Shape
from layerfold.model.block import PARTS
from layerfold.model.decoder import Decoder
from layerfold.planning import harms as harms_module
from layerfold.planning.harms import estimated
from layerfold.planning.library import GONE, Choice, Library, Limit
from layerfold.planning.speed import Speeds

CUT = windows()
FAMILIES = pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gptj", "phi3"])


def library(decoder: Decoder) -> Library:
    return Library(decoder, CUT, CUT)


def size(found: Library, choice: Choice) -> float:
    return Limit(0, found.sizes).of(choice)


def changed(choice: Choice, changes: Mapping[int, Shape]) -> Choice:
    return tuple(changes.get(index, shape) for index, shape in enumerate(choice))


def nats(decoder: Decoder) -> float:
    return float(window_nats(decoder, CUT).sum() / CUT.tokens)


@FAMILIES
def test_a_choice_is_passed_through_as_the_model_that_thin_makes(family: str) -> None:
    decoder = tiny(family).decoder
    with unchanged(decoder):
        found = library(decoder)
        whole = found.whole
        assert found.nats([whole])[0] == pytest.approx(nats(decoder), abs=1e-6)
        heads, neurons = whole[0].heads, whole[0].neurons
        choices = [
            changed(whole, changes)
            for changes in (
                {1: Shape(round(heads / 3), neurons)},
                {2: Shape(heads, round(neurons / 6))},
                {0: Shape(0, neurons), 3: Shape(heads, 0)},
                {1: Shape(round(heads * 2 / 3), round(neurons / 2))},
                {2: GONE},
                {2: GONE, 3: GONE},
                {0: GONE},
            )
        ]
        measured = found.nats(choices)
    for choice, value in zip(choices, measured, strict=True):
        made = decoder.copy()
        Thin.of(choice).apply(made, Calibration(made, CUT))
        assert value == pytest.approx(nats(made), abs=1e-4), choice
        outside = parameters(decoder) - size(found, whole)
        assert size(found, choice) + outside == parameters(made)


def made(decoder: Decoder, choice: Choice) -> Decoder:
    found = decoder.copy()
    Thin.of(choice).apply(found, Calibration(found, CUT))
    return found


@FAMILIES
def test_the_best_is_within_the_limit_and_no_other_whole_block_is_better(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = tiny(family).decoder
    found = library(decoder)
    whole = size(found, found.whole)
    outside = parameters(decoder) - whole
    for share in (0.8, 0.5):
        limit = Limit(int(share * whole), found.sizes)
        best, dropped = found.best(limit), found.dropped(limit)
        assert best is not None
        assert parameters(made(decoder, best)) - outside <= limit.amount
        assert dropped is not None
        with monkeypatch.context() as patch:
            patch.setattr(found, "_filled", lambda choice, limit: choice)
            (unfilled,) = found.nats([found.best(limit)])
        begun = [found._reduced(limit, steps) for steps in (8, 4)]
        assert unfilled == min(found.nats([*filter(None, begun), dropped]))
        (now,) = found.nats([dropped])
        for index, shape in enumerate(dropped):
            other = changed(dropped, {index: found.whole[index] if shape == GONE else GONE})
            assert size(found, other) not in range(1, int(limit.amount) + 1) or found.nats([other])[0] > now - 0.004
    least = Limit(1, found.sizes)
    assert found.best(least) is found.dropped(least) is None
    assert library(decoder).best(Limit(int(0.5 * whole), found.sizes)) == best


@FAMILIES
def test_a_small_change_costs_what_is_estimated(family: str) -> None:
    decoder = tiny(family).decoder
    here = {index: block.module for index, block in enumerate(decoder.blocks)}
    copies = decoder.copy()
    for block, part in itertools.product(copies.blocks, PARTS):
        matrix = block.output(part)
        assert matrix is not None
        matrix.own_()
        matrix.weight.mul_(1.003)
    shapes = {part: Shape(1, place) for place, part in enumerate(PARTS)}
    others = [{shapes["ffn"]: block.module, GONE: None} for block in copies.blocks]
    with unchanged(decoder):
        (one, *_, last) = estimated(decoder, CUT, [here[index] for index in range(BLOCKS)], others)
    for index, found in ((0, one), (BLOCKS - 1, last)):
        other = decoder.copy()
        other.blocks[index].module.load_state_dict(copies.blocks[index].module.state_dict())
        assert found[shapes["ffn"]] == pytest.approx(nats(other) - nats(decoder), rel=0.1, abs=5e-6)


def test_estimates_in_batches_are_those_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = library(tiny("gpt2").decoder)
    here = changed(found.whole, {1: Shape(1, 21), 2: GONE})
    at_once = found._estimated_harms(here)
    found._estimates.clear()
    monkeypatch.setattr(harms_module, "batch_tokens", lambda decoder, states: 1)
    for one, other in zip(at_once, found._estimated_harms(here), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-6)


def test_the_estimate_is_the_formula() -> None:
    decoder = tiny("gpt2").decoder
    states: dict[int, torch.Tensor] = {}
    hooks = [
        block.module.register_forward_hook(lambda _, __, out, index=block.index: states.update({index: out}))
        for block in decoder.blocks
    ]
    ids = CUT.input_ids[:1]
    logits = decoder.model(ids).logits
    for hook in hooks:
        hook.remove()
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
    left = [states[index][0] if isinstance(states[index], tuple) else states[index] for index in range(BLOCKS)]
    gradients = torch.autograd.grad(loss, left)
    modules = [block.module for block in decoder.blocks]
    one = dataclasses.replace(CUT, input_ids=ids, lengths=CUT.lengths[:1], first_scored=CUT.first_scored[:1])
    found = estimated(decoder, one, modules, [{GONE: None}] * BLOCKS)
    for index in range(1, BLOCKS):
        felt = (gradients[index] * (left[index - 1] - left[index])).sum(-1).detach()
        expected = float((felt + felt.square() / 2).sum()) / (len(ids[0]) - 1)
        assert found[index][GONE] == pytest.approx(expected, rel=1e-4)


def test_the_programme_finds_the_least_sum_within_the_limit_and_the_changes() -> None:
    found = library(tiny("gpt2").decoder)
    whole, options = found.whole, found._options[0]
    seeded = torch.Generator().manual_seed(0)
    some = [whole[0], *options[3:11:2], GONE]
    harms = [
        {shape: 0.0 if shape == whole[0] else float(torch.rand((), generator=seeded)) for shape in some}
        for _ in range(BLOCKS)
    ]
    for share, changes in ((0.7, 4), (0.7, 2), (0.4, 4), (0.9, 1)):
        limit = int(share * size(found, whole))
        expected = math.inf
        for choice in itertools.product(some, repeat=BLOCKS):
            if size(found, choice) <= limit and sum(a != b for a, b in zip(choice, whole, strict=True)) <= changes:
                expected = min(expected, sum(each[shape] for each, shape in zip(harms, choice, strict=True)))
        chosen = found._solved(harms, Limit(limit, found.sizes), whole, changes)
        if math.isinf(expected):
            assert chosen is None
            continue
        assert chosen is not None
        assert size(found, chosen) <= limit
        assert sum(each[shape] for each, shape in zip(harms, chosen, strict=True)) == pytest.approx(expected)


def test_a_block_that_is_gone_may_come_back() -> None:
    found = library(tiny("gpt2").decoder)
    here = changed(found.whole, {2: GONE})
    harms = found._measured_harms(here)
    assert harms[2] == {GONE: 0, found.whole[2]: found.nats([found.whole])[0] - found.nats([here])[0]}
    assert harms[3][GONE] == found.nats([changed(here, {3: GONE})])[0] - found.nats([here])[0]
    estimates = found._estimated_harms(here)
    assert {*estimates[2]} == {*found._options[2]}
    assert estimates[2][GONE] == estimates[1][found.whole[1]] == 0


def test_room_goes_to_the_neurons_that_gain_most() -> None:
    found = library(tiny("gpt2").decoder)
    here = tuple(Shape(4, 21) for _ in found.whole)
    harms = [{Shape(4, 21): 0.0, Shape(4, 43): -0.1, Shape(4, 128): -0.5, Shape(1, 43): -0.5} for _ in here]
    harms[2] = {Shape(4, 21): 0.0, Shape(4, 43): -0.2, GONE: 0.1}
    found._estimates[here] = harms
    neuron = (found.sizes[2][Shape(4, 43)] - found.sizes[2][Shape(4, 21)]) // 22
    for room, added in ((0, 0), (neuron - 1, 0), (3 * neuron + 1, 3), (1000 * neuron, 22)):
        filled = found._filled(here, Limit(size(found, here) + room, found.sizes))
        assert filled == changed(here, {2: Shape(4, 21 + added)})


def test_of_time_a_block_without_its_heads_or_its_neurons_takes_less() -> None:
    found = library(tiny("gpt2").decoder)
    timed = Speeds(BLOCKS, constant=1.0, attention=0.5, ffn=0.25, units=0.25)
    whole = Limit(0, found.sizes).of(found.whole) / BLOCKS
    costs = [{shape: timed.of(shape, each / whole) for shape, each in sizes.items()} for sizes in found.sizes]
    assert costs[0][Shape(4, 128)] == 1.0
    assert costs[0][GONE] == 0.0
    assert 0.25 < costs[0][Shape(0, 128)] < 0.5
    assert 0.5 < costs[0][Shape(4, 0)] < 0.75
    for speedup in (1.25, 2.0):
        limit = Limit(timed.left(speedup), costs)
        best = found.best(limit)
        assert best is not None
        taken = sum(timed.of(shape, found.sizes[0][shape] / whole) for shape in best if shape in found.sizes[0])
        assert (1 + BLOCKS) / (1 + taken) >= speedup
