"""Drawings of a search for a window: where sharing costs least, and what sharing more blocks costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from layerfold.records import BASE_LABEL
from layerfold.report import numerals
from layerfold.report.drawing import (
    CARD,
    MUTED,
    SERIES,
    Plot,
    draw,
    legend,
    name_points,
    on_page,
    panels,
    scales,
)
from layerfold.report.placement import Box
from layerfold.report.plots import Point, label_points, scatter
from layerfold.report.search import certain, counted, ratio
from layerfold.report.search_plots import BEST, REACH, in_range
from layerfold.report.tables import DASH, TIMES_BASE
from layerfold.report.window_columns import best_windows, name, spanned
from layerfold.search import FoundWindows, Window

ON_SELECTION = "perplexity on the selection text"
LINE: dict[str, Any] = {"linewidth": 1.6, "marker": "o", "markersize": 3.5, "zorder": 2}
CHOSEN: dict[str, Any] = BEST | {"markersize": 9.0}
# How far apart the boxes are that keep labels off a line, in points.
STEP = 6.0

Limits = tuple[float, float]


def starts(found: FoundWindows) -> list[Plot]:
    """Draw the perplexity of the windows against their first block, a line a size, few to a drawing.

    All drawings have the same scales. A figure that cannot be drawn leaves a gap: a note names the window.
    """
    title = "Perplexity against the first block of the window"
    drawn = [each for each in found.candidates if _in_reach(found, each)]
    lines = [[each for each in drawn if len(each.blocks) == size] for size in sorted({len(w.blocks) for w in drawn})]
    shown = panels(lines)
    ratios = [1.0, *(ratio(found, window) for window in drawn)]
    room = max(1.05, (max(ratios) / min(ratios)) ** 0.08)
    up = min(ratios) / room, max(ratios) * room
    most = max((window.blocks[0] for window in drawn), default=0)
    across = -0.6, 1.1 * most + 0.6
    note = _note(found)
    plots = []
    for index, panel in enumerate(shown):
        sizes = f": {len(panel[0][0].blocks)}{DASH}{len(panel[-1][0].blocks)} blocks" if len(shown) > 1 else ""
        svg = _draw_starts(found, f"starts-{index}", f"{title}{sizes}", panel, across, up)
        plots.append(Plot(f"starts-{index}", f"{title}{sizes}", svg, note if index == len(shown) - 1 else ""))
    return plots or [Plot("starts-0", title, "", note)]


def sizes(found: FoundWindows) -> Plot:
    """Draw the perplexity of the best window of each size against the parameters that it saves.

    On the test text, with its interval, where that was measured.
    """
    title = "Best window of each size against parameters removed"
    points, left_out = [Point(BASE_LABEL, BASE_LABEL, certain(0.0), certain(1.0))], []
    for window in best_windows(found):
        test = found.test(window)
        up = certain(ratio(found, window)) if test is None else test.versus_base
        if in_range(up.value):
            gone = certain(float(found.base.parameters - window.parameters))
            points.append(Point(spanned(window), "best of each size", gone, up))
        else:
            left_out.append(name(window))
    note = f"Not drawn, being out of the scale's range: {', '.join(left_out)}." if left_out else ""
    text = "perplexity on the test text" if found.tests else ON_SELECTION

    def paint(figure: Figure, axes: Axes) -> None:
        legend(figure, scatter(axes, points))
        axes.margins(0.12)
        scales(axes, "parameters removed", numerals.count, f"{text}, {TIMES_BASE}", numerals.times)

    def label(axes: Axes) -> None:
        label_points(axes, points)

    svg = draw("sizes", f"{title}; the figures are those of the tables", paint, label) if len(points) > 1 else ""
    return Plot("sizes", title, svg, note)


def _in_reach(found: FoundWindows, window: Window) -> bool:
    """Whether a window is no worse than leaves room to tell the best of each size apart."""
    best = [figure for figure in (ratio(found, each) for each in best_windows(found)) if in_range(figure)]
    return in_range(ratio(found, window)) and ratio(found, window) <= REACH * max([1.0, *best])


def _note(found: FoundWindows) -> str:
    left_out = [name(window) for window in found.candidates if not _in_reach(found, window)]
    out = f"Not drawn, being out of the scale's range: {', '.join(left_out)}."
    given_up = f"Not drawn, having been given up in the race: {counted(found.eliminated, 'window')}."
    return " ".join([*([out] if left_out else []), *([given_up] if found.eliminated else [])])


def _draw_starts(
    found: FoundWindows, plot: str, title: str, lines: Sequence[Sequence[Window]], across: Limits, up: Limits
) -> str:
    colours = SERIES[: len(lines)]
    best = {window.blocks for window in best_windows(found)}

    def paint(figure: Figure, axes: Axes) -> None:
        axes.axhline(1, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        for line, colour in zip(lines, colours, strict=True):
            axes.plot(*_columns(found, line), color=colour, **LINE)
            marked = [window for window in line if window.blocks in best]
            axes.plot(*_columns(found, marked), color=colour, markeredgecolor=CARD, **CHOSEN)
        entries = {"window": LINE, "best of its size": CHOSEN | {"markeredgecolor": CARD}}
        legend(figure, {entry: Line2D([], [], color=MUTED, **style) for entry, style in entries.items()})
        scales(axes, "first block of the window", numerals.whole, f"{ON_SELECTION}, {TIMES_BASE}", numerals.times)
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
        axes.set(xlim=across, ylim=up)

    def label(axes: Axes) -> None:
        ends = [(f"{len(line[-1].blocks)} blocks", line[-1].blocks[0], ratio(found, line[-1])) for line in lines]
        corners = [[on_page(axes, x, y) for x, y in zip(*_columns(found, line), strict=True)] for line in lines]
        obstacles = [box for line in corners for one, two in pairwise(line) for box in _along(one, two)]
        name_points(axes, ends, obstacles, colours)

    return draw(plot, f"{title}; the figures are those of the table", paint, label)


def _columns(found: FoundWindows, line: Sequence[Window]) -> tuple[list[float], list[float]]:
    """Return first blocks and ratios, with nan for windows that are not there: a line leaves them out."""
    ratios = {window.blocks[0]: ratio(found, window) for window in line}
    first = [float(start) for start in range(min(ratios), max(ratios) + 1)] if ratios else []
    return first, [ratios.get(int(start), math.nan) for start in first]


def _along(one: tuple[float, float], two: tuple[float, float]) -> list[Box]:
    """Return what a label must not cover of a line between two points of the page; nothing where one is not drawn."""
    length = math.dist(one, two)
    if not math.isfinite(length):
        return []
    count = max(1, round(length / STEP))
    (x, y), (next_x, next_y) = one, two
    return [
        Box.around(x + (next_x - x) * place / count, y + (next_y - y) * place / count, STEP, STEP)
        for place in range(count + 1)
    ]
