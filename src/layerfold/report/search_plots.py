"""Drawings of searches: what removing blocks costs, each alone and together, and what sharing windows of them does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby, pairwise

from matplotlib.axes import Axes

from layerfold.records import BASE_LABEL
from layerfold.report import drawing, numerals
from layerfold.report.drawing import Ends, Style
from layerfold.report.placement import Box
from layerfold.report.plots import LIMIT, Point, scattered
from layerfold.report.report import DASH, TIMES_BASE, Plot, certain, counted
from layerfold.report.search_columns import best, condensed, left, name, noun, ratio, spanned
from layerfold.search.results import Candidate, Found, FoundWindows, Window

# Each is an element of the page, and more would only darken the cloud.
MOST_POINTS = 2400
MOST_POINTS_A_COUNT = 240
MOST_LABELS = 12
# How many times the worst of the best the scale reaches: what is worse still would leave no room to tell those apart.
REACH = 10.0
CLOUD: Style = {"linestyle": "", "marker": "o", "markersize": 4.0, "alpha": 0.35, "markeredgewidth": 0}
FRONT: Style = {"linewidth": 1.4, "drawstyle": "steps-post", "marker": "o", "markersize": 4.0, "zorder": 2.5}

ON_SELECTION = "perplexity on the selection text"
LINE: Style = {"linewidth": 1.6, "marker": "o", "markersize": 3.5, "zorder": 2}
CHOSEN = drawing.MARKER | {"markersize": 9.0}
# How far apart the boxes are that keep labels off a line, in points.
STEP = 6.0


def pareto_front(found: Found) -> list[Candidate]:
    """Return the Pareto front of parts left and perplexity, the fewest left first."""
    front: list[Candidate] = []
    every = [each for each in (found.base, *found.candidates) if in_range(each.perplexity)]
    for candidate in sorted(every, key=lambda each: (left(found, each), each.perplexity)):
        if not front or candidate.perplexity <= front[-1].perplexity:
            front.append(candidate)
    return front


def trade_off(found: Found) -> Plot:
    """Draw the candidates' perplexity against the parts left, with the Pareto front and the names of the best."""
    title = f"Perplexity against {noun(found)}s left"
    front = pareto_front(found)
    marked = [each for each in (found.base, *best(found)) if in_range(each.perplexity)]
    if not front:
        return drawing.plot("trade-off", title, "", None)
    top = REACH * max(candidate.perplexity for candidate in (*front, *marked))
    apart = {candidate.removed for candidate in (*front, *marked)}
    others = [candidate for candidate in found.candidates if candidate.removed not in apart]
    within = [candidate for candidate in others if 1 / LIMIT < candidate.perplexity <= top]
    cloud = _thinned(within)
    notes = []
    if len(within) < len(others):
        beyond = counted(len(others) - len(within), "candidate")
        notes.append(f"Not drawn, being out of the scale, which ends at {numerals.significant(top)}: {beyond}.")
    if len(cloud) < len(within):
        more = counted(len(within) - len(cloud), "candidate")
        notes.append(
            f"Not drawn, to keep the page small: {more}; of each number, those drawn are evenly spaced by rank."
        )
    return drawing.plot("trade-off", title, " ".join(notes), _trade_off(found, cloud, front, marked))


def sensitivity(found: Found) -> Plot:
    """Draw the perplexity without each block, the others in place, as a multiple of the base's."""
    title = f"Perplexity without one {noun(found)}"
    alone = [(each.removed[0], each.perplexity) for each in found.candidates if len(each.removed) == 1]
    ratios = [(index, perplexity / found.base.perplexity) for index, perplexity in alone]
    drawn = [(index, factor) for index, factor in ratios if in_range(factor)]
    left_out = [str(index) for index, factor in ratios if not in_range(factor)]
    nothing = f"No candidate removes one {noun(found)} alone."
    note = drawing.left_out((drawing.OUT_OF_RANGE, left_out)) if alone else nothing
    return drawing.plot("sensitivity", title, note, _sensitivity(found, drawn) if drawn else None)


def in_range(value: float) -> bool:
    """Whether a logarithmic scale can show it."""
    return 1 / LIMIT < value < LIMIT


def _thinned(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return few enough candidates to draw: of each number removed, ranks evenly spaced from best to worst."""
    ranked = sorted(candidates, key=lambda each: (len(each.removed), each.perplexity))
    groups = [list(group) for _, group in groupby(ranked, key=lambda each: len(each.removed))]
    most = min(MOST_POINTS_A_COUNT, MOST_POINTS // max(1, len(groups)))
    return [
        group[round(place * (len(group) - 1) / (most - 1))] if len(group) > most else group[place]
        for group in groups
        for place in range(min(most, len(group)))
    ]


def _trade_off(
    found: Found, cloud: Sequence[Candidate], front: Sequence[Candidate], marked: Sequence[Candidate]
) -> drawing.Chart:
    def at(candidates: Sequence[Candidate]) -> tuple[list[float], list[float]]:
        return [left(found, each) for each in candidates], [each.perplexity for each in candidates]

    # The line goes on to the base where removing makes the perplexity lower.
    across, up = at([*front, found.base])
    up[-1] = front[-1].perplexity
    base = [each for each in marked if not each.removed]
    rest = [each for each in marked if each.removed]
    named = [*base, *rest[:: math.ceil(len(rest) / MOST_LABELS) or 1]]
    # Sorted by number and perplexity, they stand one above the other.
    lowest = [next(column) for _, column in groupby(cloud, key=lambda each: len(each.removed))]

    def paint(axes: Axes) -> dict[str, Style]:
        line, chosen = ({"color": drawing.SERIES[0], **style} for style in (FRONT, drawing.MARKER))
        axes.plot(*at(cloud), color=drawing.MUTED, **CLOUD)
        axes.plot(across, up, markevery=slice(len(front)), **line)
        axes.plot(*at(rest), **chosen)
        axes.plot(*at(base), **drawing.BASE)
        return {"candidates": CLOUD, "Pareto front": line, "best of each number": chosen}

    def label(axes: Axes) -> None:
        columns = [Box(x - 2, y - 2, x + 2, axes.bbox.y1) for x, y in drawing.on_page(axes, *at(lowest))]
        obstacles = [*drawing.steps_of(axes, across, up), *columns, *drawing.boxes(axes, *at(rest))]
        labels = [condensed(each) or BASE_LABEL for each in named]
        drawing.name_points(axes, list(zip(labels, *at(named), strict=True)), obstacles)

    x = drawing.Axis(f"{noun(found)}s left", numerals.whole, whole=True, margin=0.08)
    return drawing.Chart(x, drawing.Axis("perplexity", numerals.precise, margin=0.12), paint, label)


def _sensitivity(found: Found, drawn: Sequence[tuple[int, float]]) -> drawing.Chart:
    indices, ratios = [index for index, _ in drawn], [factor for _, factor in drawn]

    def paint(axes: Axes) -> dict[str, Style]:
        axes.axhline(1, **drawing.BASE_LINE)
        axes.vlines(indices, 1, ratios, color=drawing.SERIES[0], linewidth=2.0)
        axes.plot(indices, ratios, color=drawing.SERIES[0], **drawing.MARKER)
        return {}

    def label(axes: Axes) -> None:
        if drawing.width("0.00") > axes.bbox.width / found.base.blocks:
            return
        for index, factor in drawn:
            offset = (0, 10 if factor >= 1 else -10)
            text = axes.annotate(numerals.times(factor), (index, factor), offset, textcoords="offset points")
            text.set(ha="center", va="center")

    x = drawing.Axis(f"{noun(found)} removed", numerals.whole, (-0.6, found.base.blocks - 0.4), whole=True)
    return drawing.Chart(x, drawing.Axis(f"perplexity, {TIMES_BASE}", numerals.times, margin=0.1), paint, label)


def starts(found: FoundWindows) -> list[Plot]:
    """Draw the perplexity of the windows against their first block, one line a size, a few lines a drawing.

    All drawings have the same scales. A figure that cannot be drawn leaves a gap: a note names the window.
    """
    title = "Perplexity against the first block of the window"
    drawn = [each for each in found.candidates if _in_reach(found, each)]
    lines = [[each for each in drawn if len(each.blocks) == size] for size in sorted({len(w.blocks) for w in drawn})]
    shown = drawing.panels(lines)
    ratios = [1.0, *(ratio(found, window) for window in drawn)]
    room = max(1.05, (max(ratios) / min(ratios)) ** 0.08)
    up = min(ratios) / room, max(ratios) * room
    most = max((window.blocks[0] for window in drawn), default=0)
    across = -0.6, 1.1 * most + 0.6
    note = _note(found)
    plots = []
    for index, panel in enumerate(shown):
        sizes = f": {len(panel[0][0].blocks)}{DASH}{len(panel[-1][0].blocks)} blocks" if len(shown) > 1 else ""
        said = note if index == len(shown) - 1 else ""
        plots.append(drawing.plot(f"starts-{index}", f"{title}{sizes}", said, _starts(found, panel, across, up)))
    return plots or [drawing.plot("starts-0", title, note, None)]


def sizes(found: FoundWindows) -> Plot:
    """Draw the perplexity of the best window of each size against the parameters removed.

    On the test text, with its interval, where that was measured.
    """
    title = "Best window of each size against parameters removed"
    points, left_out = [Point(BASE_LABEL, BASE_LABEL, certain(0.0), certain(1.0))], []
    for window in best(found):
        test = found.test(window)
        up = certain(ratio(found, window)) if test is None else test.versus_base
        if in_range(up.value):
            gone = certain(float(found.base.parameters - window.parameters))
            points.append(Point(spanned(window), "best of each size", gone, up))
        else:
            left_out.append(name(window))
    note = drawing.left_out((drawing.OUT_OF_RANGE, left_out))
    text = "perplexity on the test text" if found.tests else ON_SELECTION

    x = drawing.Axis("parameters removed", numerals.count, margin=0.12)
    y = drawing.Axis(f"{text}, {TIMES_BASE}", numerals.times, margin=0.12)
    return drawing.plot("sizes", title, note, scattered(points, x, y, drawing.TABLES) if len(points) > 1 else None)


def _in_reach(found: FoundWindows, window: Window) -> bool:
    """Whether a window is good enough to draw: the scale must tell the best of each size apart."""
    least = [figure for figure in (ratio(found, each) for each in best(found)) if in_range(figure)]
    return in_range(ratio(found, window)) and ratio(found, window) <= REACH * max([1.0, *least])


def _note(found: FoundWindows) -> str:
    left_out = [name(window) for window in found.candidates if not _in_reach(found, window)]
    given_up = [counted(found.eliminated, "window")] if found.eliminated else []
    return drawing.left_out((drawing.OUT_OF_RANGE, left_out), ("Not drawn, having been given up in the race", given_up))


def _starts(found: FoundWindows, lines: Sequence[Sequence[Window]], across: Ends, up: Ends) -> drawing.Chart:
    colours = drawing.SERIES[: len(lines)]
    chosen = {window.blocks for window in best(found)}

    def paint(axes: Axes) -> dict[str, Style]:
        axes.axhline(1, **drawing.BASE_LINE)
        for line, colour in zip(lines, colours, strict=True):
            axes.plot(*_columns(found, line), color=colour, **LINE)
            axes.plot(*_columns(found, [window for window in line if window.blocks in chosen]), color=colour, **CHOSEN)
        return {"window": LINE, "best of its size": CHOSEN}

    def label(axes: Axes) -> None:
        ends = [(f"{len(line[-1].blocks)} blocks", line[-1].blocks[0], ratio(found, line[-1])) for line in lines]
        corners = [drawing.on_page(axes, *_columns(found, line)) for line in lines]
        obstacles = [box for line in corners for one, two in pairwise(line) for box in _along(one, two)]
        drawing.name_points(axes, ends, obstacles, colours)

    x = drawing.Axis("first block of the window", numerals.whole, across, whole=True)
    y = drawing.Axis(f"{ON_SELECTION}, {TIMES_BASE}", numerals.times, up)
    return drawing.Chart(x, y, paint, label, drawing.TABLE)


def _columns(found: FoundWindows, line: Sequence[Window]) -> tuple[list[float], list[float]]:
    """Return first blocks and ratios, nan for windows that were not measured, where the line has a gap."""
    ratios = {window.blocks[0]: ratio(found, window) for window in line}
    first = [float(start) for start in range(min(ratios), max(ratios) + 1)] if ratios else []
    return first, [ratios.get(int(start), math.nan) for start in first]


def _along(one: tuple[float, float], two: tuple[float, float]) -> list[Box]:
    """Return the boxes of a line between two points of the page, which labels must not cover; none for a gap."""
    length = math.dist(one, two)
    if not math.isfinite(length):
        return []
    count = max(1, round(length / STEP))
    (x, y), (next_x, next_y) = one, two
    return [
        Box.around(x + (next_x - x) * place / count, y + (next_y - y) * place / count, STEP, STEP)
        for place in range(count + 1)
    ]
