"""Scatter plots of one column against another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from layerfold.maths.intervals import Interval
from layerfold.records import BASE_LABEL, Results
from layerfold.report import drawing, numerals
from layerfold.report.drawing import family
from layerfold.report.placement import Box
from layerfold.report.report import Column, Plot

MARKERS = "osD^vPX"
# Further out the margins of a logarithmic axis overflow.
LIMIT = 1e100


@dataclass(frozen=True)
class Point:
    """What a scatter plot shows of one variant, with the intervals of both figures."""

    label: str
    family: str
    x: Interval
    y: Interval


def plot(results: Results, x: Column, y: Column) -> Plot:
    """Draw y, on a logarithmic scale, against x with the intervals of both.

    A figure that is not finite, or not above zero on the logarithmic scale, cannot be drawn: the plot's note names the
    variant.
    """
    name = f"{y.name}-{x.name}"
    title = f"{y.title} against {x.title}".capitalize()
    points, left_out, unbounded = [], [], []
    for label in results.labels:
        across, up = x.read(results, label), y.read(results, label)
        if across is None or up is None:
            continue
        if not (_in_range(across.value) and _in_range(up.value) and up.value > 1 / LIMIT):
            left_out.append(label)
            continue
        if not all(map(_in_range, (across.low, across.high, up.low, up.high))):
            unbounded.append(label)
        points.append(Point(numerals.printable(label), family(results, label), across, up))
    note = drawing.left_out(
        (drawing.OUT_OF_RANGE, [*map(numerals.printable, left_out)]),
        ("Drawn without the bounds that are out of range", [*map(numerals.printable, unbounded)]),
    )
    return Plot(name, title, partial(_draw, name, title, points, x, y) if points else None, note)


def _draw(name: str, title: str, points: Sequence[Point], x: Column, y: Column) -> str:
    def paint(figure: Figure, axes: Axes) -> None:
        drawing.legend(figure, scatter(axes, points))
        axes.margins(0.12)
        drawing.scales(axes, _axis(x), x.show, _axis(y), y.show)

    return drawing.draw(
        name, f"{title}; the figures are those of the table", paint, lambda axes: label_points(axes, points)
    )


def scatter(axes: Axes, points: Sequence[Point]) -> dict[str, Line2D]:
    """Draw points with their intervals, those of a family alike; return what a legend names."""
    families = [name for name in dict.fromkeys(point.family for point in points) if name != BASE_LABEL]
    handles: dict[str, Line2D] = {}
    for index, point in enumerate(points):
        if point.family == BASE_LABEL:
            colour, marker, size = drawing.INK, "*", 13.0
            axes.axhline(point.y.value, color=drawing.MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        else:
            which = families.index(point.family)
            colour, marker, size = drawing.SERIES[which % len(drawing.SERIES)], MARKERS[which % len(MARKERS)], 6.5
        bars = axes.errorbar(
            point.x.value,
            point.y.value,
            xerr=_error(point.x),
            yerr=_error(point.y),
            color=colour,
            marker=marker,
            markersize=size,
            markeredgecolor=drawing.CARD,
            markeredgewidth=0.8,
            linestyle="",
            ecolor=colour,
            elinewidth=1.2,
            capsize=3,
            capthick=1.2,
            zorder=3 - index / len(points),
        )
        handles.setdefault(point.family, bars.lines[0])
    return handles


def _error(interval: Interval) -> list[list[float]]:
    low, high = (bound if _in_range(bound) else interval.value for bound in (interval.low, interval.high))
    return [[max(0.0, interval.value - low)], [max(0.0, high - interval.value)]]


def _in_range(value: float) -> bool:
    return abs(value) < LIMIT


def _axis(column: Column) -> str:
    return f"{column.title}, {column.unit}" if column.unit else column.title


def label_points(axes: Axes, points: Sequence[Point]) -> None:
    """Name each point, covering neither a point nor a bar."""
    bars = []
    for point in points:
        x, y = drawing.on_page(axes, point.x.value, point.y.value)
        (before,), (after,) = _error(point.x)
        ends = [drawing.on_page(axes, point.x.value + shift, point.y.value)[0] for shift in (-before, after)]
        bars.append(Box(ends[0], y - 1.5, ends[1], y + 1.5))
        (below,), (above,) = _error(point.y)
        lowest = point.y.value - below if below < point.y.value else point.y.value
        ends = [drawing.on_page(axes, point.x.value, end)[1] for end in (lowest, point.y.value + above)]
        bars.append(Box(x - 1.5, ends[0], x + 1.5, ends[1]))
    drawing.name_points(axes, [(point.label, point.x.value, point.y.value) for point in points], bars)
