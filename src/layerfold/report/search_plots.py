"""Drawings of a search: what removing costs, and what each block alone is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from layerfold.records import BASE_LABEL
from layerfold.report import numerals
from layerfold.report.drawing import (
    CARD,
    INK,
    MUTED,
    SERIES,
    Plot,
    draw,
    legend,
    name_points,
    on_page,
    scales,
    steps_of,
    width,
)
from layerfold.report.placement import Box
from layerfold.report.plots import LIMIT
from layerfold.report.search import best, condensed, counted, left, noun
from layerfold.report.tables import TIMES_BASE
from layerfold.search.results import Candidate, Found

# Each is an element of the page, and more would only darken the cloud.
MOST_POINTS = 2400
MOST_POINTS_A_COUNT = 240
MOST_LABELS = 12
# How many times the worst of the best the scale reaches: what is worse still would leave no room to tell those apart.
REACH = 10.0
CLOUD: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 4.0, "alpha": 0.35, "markeredgewidth": 0}
FRONT: dict[str, Any] = {"linewidth": 1.4, "drawstyle": "steps-post", "marker": "o", "markersize": 4.0, "zorder": 2.5}
BEST: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 6.5, "markeredgewidth": 0.8, "zorder": 3}
BASE: dict[str, Any] = BEST | {"marker": "*", "markersize": 13.0}


def pareto_front(found: Found) -> list[Candidate]:
    """Return those than which none with as few or fewer left has a lower perplexity, the fewest left first."""
    front: list[Candidate] = []
    every = [each for each in (found.base, *found.candidates) if in_range(each.perplexity)]
    for candidate in sorted(every, key=lambda each: (left(found, each), each.perplexity)):
        if not front or candidate.perplexity <= front[-1].perplexity:
            front.append(candidate)
    return front


def trade_off(found: Found) -> Plot:
    """Draw the perplexity of the candidates against what they leave, with the Pareto front and the best by name."""
    title = f"Perplexity against {noun(found)}s left"
    front = pareto_front(found)
    marked = [candidate for candidate in best(found) if in_range(candidate.perplexity)]
    if not front:
        return Plot("trade-off", title, "", "")
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
    return Plot("trade-off", title, _draw_trade_off(found, title, cloud, front, marked), " ".join(notes))


def sensitivity(found: Found) -> Plot:
    """Draw the perplexity without each block, the others in place, as a multiple of the base's."""
    title = f"Perplexity without one {noun(found)}"
    alone = [(each.removed[0], each.perplexity) for each in found.candidates if len(each.removed) == 1]
    ratios = [(index, perplexity / found.base.perplexity) for index, perplexity in alone]
    drawn = [(index, ratio) for index, ratio in ratios if in_range(ratio)]
    left_out = ", ".join(str(index) for index, ratio in ratios if not in_range(ratio))
    note = f"Not drawn, being out of the scale's range: {left_out}." if left_out else ""
    if not alone:
        note = f"No candidate removes one {noun(found)} alone."
    return Plot("sensitivity", title, _draw_sensitivity(found, title, drawn) if drawn else "", note)


def in_range(value: float) -> bool:
    """Whether a logarithmic scale can show it."""
    return 1 / LIMIT < value < LIMIT


def _thinned(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return few enough of them to draw: of each number removed the same share of ranks, the ends included."""
    ranked = sorted(candidates, key=lambda each: (len(each.removed), each.perplexity))
    groups = [list(group) for _, group in groupby(ranked, key=lambda each: len(each.removed))]
    most = min(MOST_POINTS_A_COUNT, MOST_POINTS // max(1, len(groups)))
    return [
        group[round(place * (len(group) - 1) / (most - 1))] if len(group) > most else group[place]
        for group in groups
        for place in range(min(most, len(group)))
    ]


def _draw_trade_off(
    found: Found, title: str, cloud: Sequence[Candidate], front: Sequence[Candidate], marked: Sequence[Candidate]
) -> str:
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

    def paint(figure: Figure, axes: Axes) -> None:
        (candidates,) = axes.plot(*at(cloud), color=MUTED, **CLOUD)
        (line,) = axes.plot(across, up, color=SERIES[0], markevery=slice(len(front)), **FRONT)
        (chosen,) = axes.plot(*at(rest), color=SERIES[0], markeredgecolor=CARD, **BEST)
        axes.plot(*at(base), color=INK, markeredgecolor=CARD, **BASE)
        legend(figure, {"candidates": candidates, "Pareto front": line, "best of each number": chosen})
        axes.margins(0.08, 0.12)
        scales(axes, f"{noun(found)}s left", numerals.whole, "perplexity", numerals.precise)
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))

    def label(axes: Axes) -> None:
        steps = steps_of(axes, across, up)
        columns = [
            Box(x - 2, y - 2, x + 2, axes.bbox.y1)
            for x, y in (on_page(axes, left(found, each), each.perplexity) for each in lowest)
        ]
        markers = [Box.around(*on_page(axes, left(found, each), each.perplexity), 10, 10) for each in rest]
        labels = [condensed(each) or BASE_LABEL for each in named]
        name_points(axes, list(zip(labels, *at(named), strict=True)), [*steps, *columns, *markers])

    return draw("trade-off", f"{title}; the figures are those of the tables", paint, label)


def _draw_sensitivity(found: Found, title: str, drawn: Sequence[tuple[int, float]]) -> str:
    indices, ratios = [index for index, _ in drawn], [ratio for _, ratio in drawn]

    def paint(figure: Figure, axes: Axes) -> None:
        axes.axhline(1, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        axes.vlines(indices, 1, ratios, color=SERIES[0], linewidth=2.0)
        axes.plot(indices, ratios, color=SERIES[0], markeredgecolor=CARD, **BEST)
        axes.margins(y=0.1)
        scales(axes, f"{noun(found)} removed", numerals.whole, f"perplexity, {TIMES_BASE}", numerals.times)
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
        axes.set_xlim(-0.6, found.base.blocks - 0.4)

    def label(axes: Axes) -> None:
        if width("0.00") > axes.bbox.width / found.base.blocks:
            return
        for index, ratio in drawn:
            away = 1 if ratio >= 1 else -1
            axes.annotate(
                numerals.times(ratio),
                (index, ratio),
                (0, 10 * away),
                textcoords="offset points",
                ha="center",
                va="center",
            )

    return draw("sensitivity", f"{title}; the figures are those of the tables", paint, label)
