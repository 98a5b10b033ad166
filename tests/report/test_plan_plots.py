"""The drawing of a plan."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from made import make_plan
from pages import FIRST, INK, SECOND, markers, texts
from plans import TRIALS, saying, trial

from layerfold.report.plan_plots import trials_plot


@pytest.fixture(scope="module")
def plain():
    return trials_plot(make_plan())


def rules(plot):
    """The ends of dashed lines in ink across the axes."""
    dashed = [
        path for path in ElementTree.fromstring(plot.svg).iterfind(".//path[@clip-path]") if path.get("stroke") == INK
    ]
    return [[float(number) for number in re.findall(r"[\d.]+", path.get("d"))] for path in dashed]


def test_families_are_told_apart_and_what_was_planned_is_named(plain):
    plot = plain
    assert plot.title == "Perplexity against parameters"
    families = {"drop + prune", "drop", "prune", "collapse", "merge", "share"}
    assert families | {"not repaired", "front", "base", "planned", "budget: 4.59M"} <= set(texts(plot))
    assert {"parameters", "perplexity on the selection text (log scale)"} <= set(texts(plot))
    assert len(markers(plot, FIRST)) == 3
    # Two repaired, and one hollow.
    assert len(markers(plot, SECOND)) == 2
    assert len(markers(plot, SECOND, "stroke")) == 1
    # The base is a star, and what was planned stands in a ring.
    assert len(markers(plot, INK)) == 1
    (ring,) = markers(plot, INK, "stroke")
    assert ring in markers(plot, FIRST)


def test_a_family_has_its_colour_whatever_else_was_tried():
    drops = [each for each in TRIALS if each.family == "drop"]
    plot = trials_plot(make_plan(trials=drops))
    assert len(markers(plot, SECOND)) == 2
    assert not {"merge", "share"} & set(texts(plot))
    other = saying(drops[0], "other", "$other")
    assert "$other" in texts(trials_plot(make_plan(trials=[*drops, other])))


def test_points_stand_at_their_parameters_and_the_logarithm_of_their_perplexity():
    sizes = [trial("drop", 5_000_000 - 500_000 * n, 100.0 * 2**n, whole=n == 0) for n in range(3)]
    one, two, three = sorted(markers(trials_plot(make_plan(trials=sizes)), SECOND), reverse=True)
    assert one[0] - two[0] == pytest.approx(two[0] - three[0], abs=1e-3)
    assert one[1] - two[1] == pytest.approx(two[1] - three[1], abs=1e-3)
    assert one[1] > two[1]


def test_the_budget_is_a_line_across_what_it_is_of(plain):
    (vertical,) = rules(plain)
    assert vertical[0] == vertical[2]
    level = trials_plot(make_plan("perplexity", 112.5 / 86.8))
    (horizontal,) = rules(level)
    assert horizontal[1] == horizontal[3]
    # A trial has exactly that perplexity.
    assert min(abs(y - horizontal[1]) for _, y in markers(level, FIRST)) < 1e-3
    assert "budget: 1.1 × base" in texts(trials_plot(make_plan("perplexity", 1.1)))
    fast = trials_plot(make_plan("speedup", 1.3))
    assert rules(fast) == []
    assert not [text for text in texts(fast) if "budget" in text]


def test_what_is_out_of_range_is_named(plain):
    assert plain.note == "Not drawn, being out of the scale, which ends at 1,085: collapse n=2; merge n=3, tied."
    within = [each for each in TRIALS if each.perplexity < 1000]
    assert trials_plot(make_plan(trials=within)).note == ""
    endless = replace(TRIALS[-2], perplexity=math.inf)
    named = trials_plot(make_plan(trials=[*within[:3], endless]))
    assert named.note == (
        "Not drawn, being out of the scale, which ends at 868: drop 5,6 + prune 25% of neurons, repaired on all text."
    )
    assert "planned" not in texts(named)


@pytest.mark.parametrize("kind", ["parameters", "perplexity", "speedup"])
def test_nothing_that_can_be_drawn(kind):
    whole = trial("drop", 4543104, math.inf, whole=True)
    planned = make_plan(kind, 1.5, trials=[whole])
    broken = replace(planned.base, perplexity=math.inf)
    plot = trials_plot(replace(planned, base=broken, trials=(broken, whole)))
    assert plot.svg == ""
    assert plot.note == "Not drawn, being out of the scale: as it is; drop 3,5,6,7, repaired on all text."
    fine = replace(whole, perplexity=90.0)
    alone = trials_plot(replace(make_plan(kind, 1.5, trials=[fine]), base=broken, trials=(broken, fine)))
    assert "planned" in texts(alone)
    assert "base" not in texts(alone)
