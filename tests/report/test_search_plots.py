"""The drawings of a search."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import combinations
from xml.etree import ElementTree

import pytest

from layerfold.report.placement import Box
from layerfold.report.search_plots import pareto_front, sensitivity, trade_off

SPREAD = {(0,): 90.0, (1,): 80.0, (0, 1): 70.0, (0, 2): 120.0, (0, 1, 2): 110.0, (1, 2, 3): 130.0}


def texts(plot):
    return ["".join(element.itertext()).strip() for element in ElementTree.fromstring(plot.svg).iter("text")]


def markers(plot, colour):
    """Where markers of a colour stand; those of the axes and of the legend left out."""
    clipped = ElementTree.fromstring(plot.svg).iterfind(".//g[@clip-path]/use")
    return [(float(use.get("x")), float(use.get("y"))) for use in clipped if use.get("fill") == colour]


def ticks(plot, axis):
    groups = ElementTree.fromstring(plot.svg).iter("g")
    return ["".join(each.itertext()).strip() for each in groups if f"-{axis}tick_" in each.get("id", "")]


def names(found):
    return [candidate.removed for candidate in pareto_front(found)]


def test_pareto_front_by_hand(make_found):
    # 12 blocks cost 86.8, which removing 0 and 1 beats; nothing with 10 or 9 blocks is better than (0, 1) but itself.
    assert names(make_found(SPREAD)) == [(0, 1, 2), (0, 1)]
    assert names(make_found({(0,): 90.0, (1,): 95.0, (0, 1): 100.0, (1, 2): 101.0})) == [(0, 1), (0,), ()]
    assert names(make_found({(0,): 86.8, (1,): 86.8})) == [(0,), (1,), ()]
    assert names(make_found({})) == [()]


def test_figures_that_are_not_finite_are_not_on_the_front(make_found):
    assert names(make_found({(0,): math.nan, (1,): math.inf, (0, 1): math.inf, (2,): 1e5})) == [(2,), ()]
    nothing = make_found({(0,): math.nan})
    assert names(replace(nothing, base=replace(nothing.base, perplexity=math.inf))) == []


def test_the_best_are_named_and_the_rest_is_drawn(make_found, make_sets):
    found = make_found(make_sets(3))
    plot = trade_off(found)
    assert plot.title == "Perplexity against blocks left"
    assert {"base", "5", "6 7", "4 6 9", "9", "10", "11", "12", "blocks left", "Pareto front"} <= set(texts(plot))
    reach = 10 * max(candidate.perplexity for candidate in found.best.values())
    beyond = sum(candidate.perplexity > reach for candidate in found.candidates)
    assert plot.note == f"Not drawn, being out of the scale, which ends at 1,054: {beyond} candidates."
    assert len(markers(plot, "var(--muted)")) == 298 - beyond - 3
    assert len(set(markers(plot, "var(--series-0)"))) == 4
    assert len(markers(plot, "var(--ink)")) == 1


def test_points_stand_at_what_is_left_and_the_logarithm_of_their_perplexity(make_found):
    plot = trade_off(make_found({(0,): 100.0, (0, 1): 200.0, (0, 2): 400.0, (1, 2): 800.0}))
    low, high = sorted(markers(plot, "var(--muted)"), key=lambda point: -point[1])
    best_of_two, best_of_one = sorted(set(markers(plot, "var(--series-0)")))[:2]
    assert low[0] == high[0] == best_of_two[0]
    step = low[1] - high[1]
    assert best_of_two[1] - low[1] == pytest.approx(step, abs=1e-3)
    assert best_of_one[1] - best_of_two[1] == pytest.approx(step, abs=1e-3)
    assert plot.note == ""


def test_4096_candidates_make_a_small_drawing_that_keeps_the_front(make_found, make_sets):
    found = make_found(make_sets(12))
    assert len(found.candidates) == 4095
    plot = trade_off(found)
    assert len(plot.svg) < 600_000
    drawn = len(markers(plot, "var(--muted)"))
    assert 1500 < drawn <= 2400
    assert plot.note == (
        f"Not drawn, to keep the page small: {4095 - 12 - drawn:,} candidates; "
        "of each number, those drawn are evenly spaced by rank."
    )
    across, up = zip(*sorted(set(markers(plot, "var(--series-0)"))), strict=True)
    assert len(across) == len(pareto_front(found)) == 13
    # Further right is lower on the page, whose y grows downwards.
    assert list(up) == sorted(up)


def test_labels_cover_no_label(make_found, make_sets):
    plot = trade_off(make_found(make_sets(12)))
    boxes = []
    for element in ElementTree.fromstring(plot.svg).iter("text"):
        text = "".join(element.itertext()).strip()
        if element.get("fill") == "var(--ink)" and "rotate(-90" not in element.get("transform", ""):
            anchor = {"start": 0.5, "middle": 0.0, "end": -0.5}[element.get("text-anchor", "start")]
            wide = 0.5 * 9.5 * len(text)
            boxes.append(Box.around(float(element.get("x")) + anchor * wide, float(element.get("y")), wide, 8))
    assert len(boxes) > 12
    assert sum(one.overlap(other) for one, other in combinations(boxes, 2)) == 0


@pytest.mark.parametrize(("part", "left", "alone"), [("attention", "attention layer", "0"), ("ffn", "FFN", "0")])
def test_sublayers_are_on_the_axes(make_found, part, left, alone):
    found = make_found({(0,): 90.0, (0, 3): 99.0}, settings={"part": part})
    found = replace(found, candidates=tuple(replace(each, blocks=12) for each in found.candidates))
    assert trade_off(found).title == f"Perplexity against {left}s left"
    assert {f"{left}s left", "10", "11", "12"} <= set(texts(trade_off(found)))
    assert sensitivity(found).title == f"Perplexity without one {left}"
    assert {f"{left} removed", alone} <= set(texts(sensitivity(found)))


@pytest.mark.parametrize("blocks", [1, 2, 12, 48])
def test_axes_are_legible_for_any_depth(make_found, blocks):
    found = make_found({(index,): 90.0 + index for index in range(blocks)}, blocks=blocks)
    for plot, first in ((trade_off(found), blocks - 1), (sensitivity(found), 0)):
        indices = [int(tick) for tick in ticks(plot, "x")]
        assert 1 <= len(indices) <= 13
        assert min(indices) >= 0
        assert first in indices or blocks > 12
        assert indices == sorted(set(indices))
        assert len(ticks(plot, "y")) >= 2


def test_sensitivity_shows_the_ratio_of_each_block(make_found):
    plot = sensitivity(make_found({(0,): 868.0, (1,): 43.4, (2,): 86.8, (1, 2): 99.0}))
    assert plot.title == "Perplexity without one block"
    assert plot.note == ""
    assert {"10.0", "0.50", "1.00", "perplexity, × base (log scale)", "block removed"} <= set(texts(plot))
    points = sorted(set(markers(plot, "var(--series-0)")))
    assert len(points) == 3
    ten, half, one = (y for _, y in points)
    assert (one - ten) / (half - one) == pytest.approx(math.log(10) / math.log(2), rel=1e-3)


def test_sensitivity_leaves_out_and_names_what_is_not_finite(make_found):
    plot = sensitivity(make_found({(0,): math.nan, (1,): math.inf, (2,): 1e5}))
    assert plot.note == "Not drawn, being out of the scale's range: 0, 1."
    assert len(set(markers(plot, "var(--series-0)"))) == 1


def test_without_single_blocks_there_is_no_sensitivity(make_found):
    plot = sensitivity(make_found({(0, 1): 99.0}))
    assert (plot.svg, plot.note) == ("", "No candidate removes one block alone.")
    assert sensitivity(make_found({(0,): math.nan})).svg == ""


def test_absurd_figures_are_left_out(make_found):
    found = make_found({(0,): math.nan, (1,): 0.0, (2,): 1e300, (3,): 100.0, (4,): -1.0, (5,): math.inf})
    found = replace(found, best={1: found.candidates[3]})
    assert trade_off(found).note.endswith(": 5 candidates.")
    nothing = replace(found, base=replace(found.base, perplexity=math.nan), candidates=found.candidates[:2], best={})
    assert (trade_off(nothing).svg, sensitivity(nothing).svg) == ("", "")
    assert "base" in texts(trade_off(make_found({})))


def test_the_line_ends_at_the_base_though_removing_is_better(make_found):
    assert "base" in texts(trade_off(make_found(SPREAD)))


def test_drawings_are_the_same_each_time_and_stand_alone(make_found, make_sets):
    drawings = [[draw(make_found(make_sets(2))) for draw in (trade_off, sensitivity)] for _ in range(2)]
    assert drawings[0] == drawings[1]
    ids = [re.findall(r'\bid="([^"]+)"', plot.svg) for plot in drawings[0]]
    assert not set(ids[0]) & set(ids[1])
    for own, plot in zip(ids, drawings[0], strict=True):
        assert len(own) == len(set(own))
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', plot.svg)) <= set(own)
        assert "style=" not in plot.svg
        assert not re.search(r'"#0[0-9a-f]{5}"', plot.svg)
