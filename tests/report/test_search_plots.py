"""The drawings of searches: for blocks to drop, and for a window to share."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from xml.etree import ElementTree

import pytest
from made import make_found, make_sets, make_windows
from pages import FIRST, INK, MUTED, SECOND, markers, texts, ticks

from layerfold.report.placement import Box
from layerfold.report.search_plots import pareto_front, sensitivity, sizes, starts, trade_off

SPREAD = {(0,): 90.0, (1,): 80.0, (0, 1): 70.0, (0, 2): 120.0, (0, 1, 2): 110.0, (1, 2, 3): 130.0}


@pytest.fixture(scope="module")
def largest():
    """What a search of all sets of 12 blocks finds, and its drawing."""
    found = make_found(make_sets(12))
    return found, trade_off(found)


def names(found):
    return [candidate.removed for candidate in pareto_front(found)]


@pytest.mark.parametrize(
    ("perplexities", "front"),
    [
        # 12 blocks cost 86.8, which removing 0 and 1 beats; nothing with 10 or 9 is better than (0, 1) but itself.
        (SPREAD, [(0, 1, 2), (0, 1)]),
        ({(0,): 90.0, (1,): 95.0, (0, 1): 100.0, (1, 2): 101.0}, [(0, 1), (0,), ()]),
        ({(0,): 86.8, (1,): 86.8}, [(0,), (1,), ()]),
        ({}, [()]),
        ({(0,): math.nan, (1,): math.inf, (0, 1): math.inf, (2,): 1e5}, [(2,), ()]),
    ],
    ids=["spread", "rising", "equal", "none", "not finite"],
)
def test_pareto_front_by_hand(perplexities, front):
    assert names(make_found(perplexities)) == front
    nothing = make_found({(0,): math.nan})
    assert names(replace(nothing, base=replace(nothing.base, perplexity=math.inf))) == []


def test_the_best_are_named_and_the_rest_is_drawn():
    found = make_found(make_sets(3))
    plot = trade_off(found)
    assert plot.title == "Perplexity against blocks left"
    assert {"base", "5", "6 7", "4 6 9", "9", "10", "11", "12", "blocks left", "Pareto front"} <= set(texts(plot))
    reach = 10 * max(candidate.perplexity for candidate in found.best.values())
    beyond = sum(candidate.perplexity > reach for candidate in found.candidates)
    assert plot.note == f"Not drawn, being out of the scale, which ends at 1,054: {beyond} candidates."
    assert len(markers(plot, MUTED)) == 298 - beyond - 3
    assert len(set(markers(plot, FIRST))) == 4
    assert len(markers(plot, INK)) == 1


def test_points_stand_at_what_is_left_and_the_logarithm_of_their_perplexity():
    plot = trade_off(make_found({(0,): 100.0, (0, 1): 200.0, (0, 2): 400.0, (1, 2): 800.0}))
    low, high = sorted(markers(plot, MUTED), key=lambda point: -point[1])
    best_of_two, best_of_one = sorted(set(markers(plot, FIRST)))[:2]
    assert low[0] == high[0] == best_of_two[0]
    step = low[1] - high[1]
    assert best_of_two[1] - low[1] == pytest.approx(step, abs=1e-3)
    assert best_of_one[1] - best_of_two[1] == pytest.approx(step, abs=1e-3)
    assert plot.note == ""


def test_4096_candidates_make_a_small_drawing_that_keeps_the_front(largest):
    found, plot = largest
    assert len(found.candidates) == 4095
    assert len(plot.svg) < 600_000
    drawn = len(markers(plot, MUTED))
    assert 1500 < drawn <= 2400
    assert plot.note == (
        f"Not drawn, to keep the page small: {4095 - 12 - drawn:,} candidates; "
        "of each number, those drawn are evenly spaced by rank."
    )
    across, up = zip(*sorted(set(markers(plot, FIRST))), strict=True)
    assert len(across) == len(pareto_front(found)) == 13
    # Further right is lower on the page, whose y grows downwards.
    assert list(up) == sorted(up)


def test_labels_cover_no_label(largest):
    _, plot = largest
    boxes = []
    for element in ElementTree.fromstring(plot.svg).iter("text"):
        text = "".join(element.itertext()).strip()
        if element.get("fill") == INK and "rotate(-90" not in element.get("transform", ""):
            anchor = {"start": 0.5, "middle": 0.0, "end": -0.5}[element.get("text-anchor", "start")]
            wide = 0.5 * 9.5 * len(text)
            boxes.append(Box.around(float(element.get("x")) + anchor * wide, float(element.get("y")), wide, 8))
    assert len(boxes) > 12
    assert sum(one.overlap(other) for one, other in combinations(boxes, 2)) == 0


@pytest.mark.parametrize(("part", "left", "alone"), [("attention", "attention layer", "0"), ("ffn", "FFN", "0")])
def test_sublayers_are_on_the_axes(part, left, alone):
    found = make_found({(0,): 90.0, (0, 3): 99.0}, settings={"part": part})
    found = replace(found, candidates=tuple(replace(each, blocks=12) for each in found.candidates))
    together, single = trade_off(found), sensitivity(found)
    assert together.title == f"Perplexity against {left}s left"
    assert {f"{left}s left", "10", "11", "12"} <= set(texts(together))
    assert single.title == f"Perplexity without one {left}"
    assert {f"{left} removed", alone} <= set(texts(single))


@pytest.mark.parametrize("blocks", [1, 2, 12, 48])
def test_axes_are_legible_for_any_depth(blocks):
    found = make_found({(index,): 90.0 + index for index in range(blocks)}, blocks=blocks)
    windows = starts(make_windows({(start, 2): 90.0 + start for start in range(blocks - 1)})) if blocks > 1 else []
    for plot, first in ((trade_off(found), blocks - 1), (sensitivity(found), 0), *((plot, None) for plot in windows)):
        indices = [int(tick) for tick in ticks(plot, "x")]
        assert 1 <= len(indices) <= 13
        assert min(indices) >= 0
        assert first is None or first in indices or blocks > 12
        assert indices == sorted(set(indices))
        assert len(ticks(plot, "y")) >= 2


def test_sensitivity_shows_the_ratio_of_each_block():
    plot = sensitivity(make_found({(0,): 868.0, (1,): 43.4, (2,): 86.8, (1, 2): 99.0}))
    assert plot.title == "Perplexity without one block"
    assert plot.note == ""
    assert {"10.0", "0.50", "1.00", "perplexity, × base (log scale)", "block removed"} <= set(texts(plot))
    points = sorted(set(markers(plot, FIRST)))
    assert len(points) == 3
    ten, half, one = (y for _, y in points)
    assert (one - ten) / (half - one) == pytest.approx(math.log(10) / math.log(2), rel=1e-3)


def test_sensitivity_leaves_out_and_names_what_it_cannot_draw():
    plot = sensitivity(make_found({(0,): math.nan, (1,): math.inf, (2,): 1e5}))
    assert plot.note == "Not drawn, being out of the scale's range: 0, 1."
    assert len(set(markers(plot, FIRST))) == 1
    plot = sensitivity(make_found({(0, 1): 99.0}))
    assert (plot.svg, plot.note) == ("", "No candidate removes one block alone.")
    assert sensitivity(make_found({(0,): math.nan})).svg == ""


def test_absurd_figures_are_left_out():
    found = make_found({(0,): math.nan, (1,): 0.0, (2,): 1e300, (3,): 100.0, (4,): -1.0, (5,): math.inf})
    found = replace(found, best={1: found.candidates[3]})
    assert trade_off(found).note.endswith(": 5 candidates.")
    nothing = replace(found, base=replace(found.base, perplexity=math.nan), candidates=found.candidates[:2], best={})
    assert (trade_off(nothing).svg, sensitivity(nothing).svg) == ("", "")
    for perplexities in ({}, SPREAD):
        assert "base" in texts(trade_off(make_found(perplexities))), "though removing is better"


def pieces(plot, colour):
    """How many pieces each line through data of a colour is drawn in."""
    paths = ElementTree.fromstring(plot.svg).iterfind(".//path[@clip-path]")
    return [path.get("d").count("M") for path in paths if path.get("stroke") == colour]


def test_a_line_a_size_named_where_it_ends():
    (plot,) = starts(make_windows())
    assert plot.title == "Perplexity against the first block of the window"
    assert {"2 blocks", "3 blocks", "first block of the window", "best of its size"} <= set(texts(plot))
    assert "perplexity on the selection text, × base (log scale)" in texts(plot)
    assert plot.note == ""
    two, three = markers(plot, FIRST), markers(plot, SECOND)
    # The best of each size is marked once more.
    assert (len(two), len(three)) == (3 + 1, 2 + 1)
    assert two[3] == two[1]
    assert three[2] == three[1]


def test_points_stand_at_the_first_block_and_the_logarithm_of_the_ratio():
    (plot,) = starts(make_windows({(0, 2): 868.0, (1, 2): 173.6, (3, 2): 86.8}))
    (first, second, third), (marked,) = markers(plot, FIRST)[:3], markers(plot, FIRST)[3:]
    assert third[0] - second[0] == pytest.approx(2 * (second[0] - first[0]), abs=1e-3)
    assert (second[1] - first[1]) / (third[1] - second[1]) == pytest.approx(math.log(5) / math.log(2), rel=1e-3)
    assert marked == third


def test_a_line_stops_where_a_window_is_not_there():
    whole = starts(make_windows({(start, 2): 90.0 + start for start in range(5)}))[0]
    broken = starts(make_windows({(start, 2): 90.0 + start for start in (0, 1, 3, 4)}))[0]
    assert [pieces(plot, FIRST)[0] for plot in (whole, broken)] == [1, 2]


def test_what_is_not_drawn_is_named():
    perplexities = {(0, 2): math.nan, (1, 2): math.inf, (2, 2): 90.0, (0, 3): 0.0}
    (plot,) = starts(make_windows(perplexities, eliminated=1))
    assert plot.note == (
        "Not drawn, being out of the scale's range: 0:2, 1:2, 0:3. Not drawn, having been given up in the race: "
        "1 window."
    )
    assert len(markers(plot, FIRST)) == 2
    assert markers(plot, SECOND) == []
    (nothing,) = starts(make_windows({(0, 2): math.nan}))
    assert nothing.svg == ""
    found = make_windows()
    assert starts(replace(found, base=replace(found.base, perplexity=math.nan)))[0].svg == ""


def test_windows_far_worse_than_the_best_are_left_out():
    (plot,) = starts(make_windows({(0, 2): 86.8e4, (1, 2): 86.8, (2, 2): 868.0, (0, 3): 173.6}))
    assert plot.note == "Not drawn, being out of the scale's range: 0:2."
    assert len(markers(plot, FIRST)) == 2 + 1


def test_many_sizes_are_shared_out_on_the_same_scales():
    plots = starts(make_windows({(s, k): 86.0 + s * k for k in range(2, 13) for s in range(13 - k)}, eliminated=3))
    assert [plot.title.rpartition(": ")[2] for plot in plots] == ["2–7 blocks", "8–12 blocks"]
    assert [f"{size} blocks" in texts(plots[size > 7]) for size in range(2, 13)] == [True] * 11
    assert ticks(plots[0], "x") == ticks(plots[1], "x")
    assert ticks(plots[0], "y") == ticks(plots[1], "y")
    assert [plot.note for plot in plots] == ["", "Not drawn, having been given up in the race: 3 windows."]


def test_the_best_of_each_size_against_what_they_save():
    plot = sizes(make_windows())
    assert {"base", "1–2", "1–3", "best of each size", "parameters removed"} <= set(texts(plot))
    assert "perplexity on the test text, × base (log scale)" in texts(plot)
    # The ends of a bar stand above and below its marker.
    (base,) = {x for x, _ in markers(plot, INK)}
    two, three = sorted({x for x, _ in markers(plot, FIRST)})
    assert three - base == pytest.approx(2 * (two - base), abs=1e-3)
    heights = {end: sorted(y for x, y in markers(plot, FIRST) if x == end) for end in (two, three)}
    # Higher on the page is a smaller y.
    assert max(heights[three]) < min(heights[two])
    assert plot.note == ""


def test_without_test_text_the_selection_text_is_drawn_and_what_cannot_be_is_named():
    found = make_windows(tests={})
    assert "perplexity on the selection text, × base (log scale)" in texts(sizes(found))
    broken = replace(found, best={2: found.best[2], 3: replace(found.best[3], perplexity=math.inf)})
    assert sizes(broken).note == "Not drawn, being out of the scale's range: 1:3."
    nothing = replace(found, best={size: replace(each, perplexity=math.nan) for size, each in found.best.items()})
    assert sizes(nothing).svg == ""
