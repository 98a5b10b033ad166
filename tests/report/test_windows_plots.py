"""The drawings of a search for a window to share."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from layerfold.report.window_plots import sizes, starts


def texts(plot):
    return ["".join(element.itertext()).strip() for element in ElementTree.fromstring(plot.svg).iter("text")]


def markers(plot, colour):
    """Where markers of a colour stand; those of the axes and of the legend left out."""
    clipped = ElementTree.fromstring(plot.svg).iterfind(".//g[@clip-path]/use")
    return [(float(use.get("x")), float(use.get("y"))) for use in clipped if use.get("fill") == colour]


def ticks(plot, axis):
    groups = ElementTree.fromstring(plot.svg).iter("g")
    return ["".join(each.itertext()).strip() for each in groups if f"-{axis}tick_" in each.get("id", "")]


def pieces(plot, colour):
    """How many pieces each line through data of a colour is drawn in."""
    paths = ElementTree.fromstring(plot.svg).iterfind(".//path[@clip-path]")
    return [path.get("d").count("M") for path in paths if path.get("stroke") == colour]


def test_a_line_a_size_named_where_it_ends(make_windows):
    (plot,) = starts(make_windows())
    assert plot.title == "Perplexity against the first block of the window"
    assert {"2 blocks", "3 blocks", "first block of the window", "best of its size"} <= set(texts(plot))
    assert "perplexity on the selection text, × base (log scale)" in texts(plot)
    assert plot.note == ""
    two, three = markers(plot, "var(--series-0)"), markers(plot, "var(--series-1)")
    # The best of each size is marked once more.
    assert (len(two), len(three)) == (3 + 1, 2 + 1)
    assert two[3] == two[1]
    assert three[2] == three[1]


def test_points_stand_at_the_first_block_and_the_logarithm_of_the_ratio(make_windows):
    (plot,) = starts(make_windows({(0, 2): 868.0, (1, 2): 173.6, (3, 2): 86.8}))
    (first, second, third), (marked,) = markers(plot, "var(--series-0)")[:3], markers(plot, "var(--series-0)")[3:]
    assert third[0] - second[0] == pytest.approx(2 * (second[0] - first[0]), abs=1e-3)
    assert (second[1] - first[1]) / (third[1] - second[1]) == pytest.approx(math.log(5) / math.log(2), rel=1e-3)
    assert marked == third


def test_a_line_stops_where_a_window_is_not_there(make_windows):
    whole = starts(make_windows({(start, 2): 90.0 + start for start in range(5)}))[0]
    broken = starts(make_windows({(start, 2): 90.0 + start for start in (0, 1, 3, 4)}))[0]
    assert [pieces(plot, "var(--series-0)")[0] for plot in (whole, broken)] == [1, 2]


def test_what_is_not_drawn_is_named(make_windows):
    perplexities = {(0, 2): math.nan, (1, 2): math.inf, (2, 2): 90.0, (0, 3): 0.0}
    (plot,) = starts(make_windows(perplexities, eliminated=1))
    assert plot.note == (
        "Not drawn, being out of the scale's range: 0:2, 1:2, 0:3. Not drawn, having been given up in the race: "
        "1 window."
    )
    assert len(markers(plot, "var(--series-0)")) == 2
    assert markers(plot, "var(--series-1)") == []
    (nothing,) = starts(make_windows({(0, 2): math.nan}))
    assert nothing.svg == ""
    found = make_windows()
    assert starts(replace(found, base=replace(found.base, perplexity=math.nan)))[0].svg == ""


def test_windows_far_worse_than_the_best_are_left_out(make_windows):
    (plot,) = starts(make_windows({(0, 2): 86.8e4, (1, 2): 86.8, (2, 2): 868.0, (0, 3): 173.6}))
    assert plot.note == "Not drawn, being out of the scale's range: 0:2."
    assert len(markers(plot, "var(--series-0)")) == 2 + 1


def test_many_sizes_are_shared_out_on_the_same_scales(make_windows):
    plots = starts(make_windows({(s, k): 86.0 + s * k for k in range(2, 13) for s in range(13 - k)}, eliminated=3))
    assert [plot.title.rpartition(": ")[2] for plot in plots] == ["2–7 blocks", "8–12 blocks"]
    assert [f"{size} blocks" in texts(plots[size > 7]) for size in range(2, 13)] == [True] * 11
    assert ticks(plots[0], "x") == ticks(plots[1], "x")
    assert ticks(plots[0], "y") == ticks(plots[1], "y")
    assert [plot.note for plot in plots] == ["", "Not drawn, having been given up in the race: 3 windows."]


@pytest.mark.parametrize("blocks", [2, 3, 12, 48])
def test_axes_are_legible_for_any_depth(make_windows, blocks):
    for plot in starts(make_windows({(start, 2): 90.0 + start for start in range(blocks - 1)})):
        indices = [int(tick) for tick in ticks(plot, "x")]
        assert 1 <= len(indices) <= 13
        assert min(indices) >= 0
        assert indices == sorted(set(indices))
        assert len(ticks(plot, "y")) >= 2


def test_the_best_of_each_size_against_what_they_save(make_windows):
    plot = sizes(make_windows())
    assert {"base", "1–2", "1–3", "best of each size", "parameters removed"} <= set(texts(plot))
    assert "perplexity on the test text, × base (log scale)" in texts(plot)
    # The ends of a bar stand above and below its marker.
    (base,) = {x for x, _ in markers(plot, "var(--ink)")}
    two, three = sorted({x for x, _ in markers(plot, "var(--series-0)")})
    assert three - base == pytest.approx(2 * (two - base), abs=1e-3)
    heights = {end: sorted(y for x, y in markers(plot, "var(--series-0)") if x == end) for end in (two, three)}
    # Higher on the page is a smaller y.
    assert max(heights[three]) < min(heights[two])
    assert plot.note == ""


def test_without_test_text_the_selection_text_is_drawn(make_windows):
    assert "perplexity on the selection text, × base (log scale)" in texts(sizes(make_windows(tests={})))


def test_the_best_that_cannot_be_drawn_are_named(make_windows):
    found = make_windows(tests={})
    broken = replace(found, best={2: found.best[2], 3: replace(found.best[3], perplexity=math.inf)})
    assert sizes(broken).note == "Not drawn, being out of the scale's range: 1:3."
    nothing = replace(found, best={size: replace(each, perplexity=math.nan) for size, each in found.best.items()})
    assert sizes(nothing).svg == ""


def test_drawings_are_the_same_each_time_and_stand_alone(make_windows):
    found = make_windows({(s, k): 86.0 + s * k for k in range(2, 10) for s in range(10 - k)})
    drawings = [[*starts(found), sizes(found)] for _ in range(2)]
    assert drawings[0] == drawings[1]
    ids = [re.findall(r'\bid="([^"]+)"', plot.svg) for plot in drawings[0]]
    assert len({name for own in ids for name in own}) == sum(map(len, ids))
    for own, plot in zip(ids, drawings[0], strict=True):
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', plot.svg)) <= set(own)
        assert "style=" not in plot.svg
        assert not re.search(r'"#0[0-9a-f]{5}"', plot.svg)
