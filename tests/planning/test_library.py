"""The library of a plan: its versions pass text through as the models that `Thin` makes, and what it chooses."""

from __future__ import annotations

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
from layerfold.model.decoder import Decoder
from layerfold.planning.library import GONE, Choice, Library

CUT = windows()
FAMILIES = pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gptj", "phi3"])


def library(decoder: Decoder) -> Library:
    return Library(decoder, CUT, CUT)


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
        outside = parameters(decoder) - found.size(whole)
        assert found.size(choice) + outside == parameters(made)


@FAMILIES
def test_the_best_is_small_enough_and_no_worse_than_what_it_begins_with(family: str) -> None:
    decoder = tiny(family).decoder
    found = library(decoder)
    whole = found.size(found.whole)
    for share in (0.8, 0.5):
        best = found.best(int(share * whole))
        assert best is not None
        assert found.size(best) <= share * whole
        assert any(shape != GONE for shape in best)
        limit, (now,) = int(share * whole), found.nats([best])
        dropped = found.best(limit, parts=False)
        assert dropped is None or now <= found.nats([dropped])[0]
        every = [
            tuple(GONE if index % 2 else shape for index, shape in enumerate(found.whole)),
            tuple(GONE if index == gone else shape for gone in [BLOCKS - 1] for index, shape in enumerate(found.whole)),
        ]
        assert all(now <= found.nats([each])[0] for each in every if found.size(each) <= limit)
        for index, each in enumerate(found._harms(best, found._options)):
            for shape in each:
                changes = changed(best, {index: shape})
                if found.size(changes) <= limit and 0 in (
                    shape.heads - best[index].heads,
                    shape.neurons - best[index].neurons,
                ):
                    assert found.nats([changes])[0] > now - 0.004
    assert found.best(1) is None
    assert library(decoder).best(int(0.5 * whole)) == best


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
        limit = int(share * found.size(whole))
        expected = math.inf
        for choice in itertools.product(some, repeat=BLOCKS):
            if found.size(choice) <= limit and sum(a != b for a, b in zip(choice, whole, strict=True)) <= changes:
                expected = min(expected, sum(each[shape] for each, shape in zip(harms, choice, strict=True)))
        chosen = found._solved(harms, limit, whole, changes)
        if math.isinf(expected):
            assert chosen is None
            continue
        assert chosen is not None
        assert found.size(chosen) <= limit
        assert sum(each[shape] for each, shape in zip(harms, chosen, strict=True)) == pytest.approx(expected)


def test_harms_of_heads_and_neurons_add_up_and_a_block_that_is_gone_may_come_back() -> None:
    found = library(tiny("gpt2").decoder)
    here = changed(found.whole, {1: Shape(4, 64), 2: GONE})
    harms = found._harms(here, found._options)
    both = harms[1][Shape(1, 21)]
    assert both == pytest.approx(harms[1][Shape(1, 64)] + harms[1][Shape(4, 21)])
    assert harms[1][Shape(4, 64)] == harms[2][GONE] == 0
    assert harms[2][Shape(4, 128)] == pytest.approx(harms[2][Shape(4, 0)] + harms[2][Shape(0, 128)])
    assert harms[3][GONE] == pytest.approx(found.nats([changed(here, {3: GONE})])[0] - found.nats([here])[0])
