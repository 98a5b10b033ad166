"""Scatter plots of one column against another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from matplotlib.axes import Axes

from layerfold.maths.intervals import Interval
from layerfold.records import BASE_LABEL, Results
from layerfold.report import drawing, numerals
from layerfold.report.drawing import Style, family
from layerfold.report.placement import Box
from layerfold.report.report import Column, Plot

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
        one, other = x.read(results, label), y.read(results, label)
        if one is None or other is None:
            continue
        if not (_in_range(one.value) and _in_range(other.value) and other.value > 1 / LIMIT):
            left_out.append(label)
            continue
        if not all(map(_in_range, (one.low, one.high, other.low, other.high))):
            unbounded.append(label)
        points.append(Point(numerals.printable(label), family(results, label), one, other))
    note = drawing.left_out(
        (drawing.OUT_OF_RANGE, [*map(numerals.printable, left_out)]),
        ("Drawn without the bounds that are out of range", [*map(numerals.printable, unbounded)]),
    )
    across, up = (drawing.Axis(_axis(column), column.show, margin=0.12) for column in (x, y))
    return drawing.plot(name, title, note, scattered(points, across, up, drawing.TABLE) if points else None)


def scattered(points: Sequence[Point], x: drawing.Axis, y: drawing.Axis, figures: str) -> drawing.Chart:
    """Return a chart of points with their names and intervals, and a marker for each family."""
    return drawing.Chart(x, y, partial(_scatter, points), partial(_label, points), figures)


def _scatter(points: Sequence[Point], axes: Axes) -> dict[str, Style]:
    families = [name for name in dict.fromkeys(point.family for point in points) if name != BASE_LABEL]
    entries: dict[str, Style] = {}
    for index, point in enumerate(points):
        if point.family == BASE_LABEL:
            style = drawing.BASE
            axes.axhline(point.y.value, **drawing.BASE_LINE)
        else:
            style = drawing.series(families.index(point.family))
        bars = {"xerr": _error(point.x), "yerr": _error(point.y), "ecolor": style["color"]}
        size = {"elinewidth": 1.2, "capsize": 3, "capthick": 1.2, "zorder": 3 - index / len(points)}
        axes.errorbar(point.x.value, point.y.value, **style | bars | size)
        entries.setdefault(point.family, style)
    return entries


def _error(interval: Interval) -> list[list[float]]:
    low, high = (bound if _in_range(bound) else interval.value for bound in (interval.low, interval.high))
    return [[max(0.0, interval.value - low)], [max(0.0, high - interval.value)]]


def _in_range(value: float) -> bool:
    return abs(value) < LIMIT


def _axis(column: Column) -> str:
    return f"{column.title}, {column.unit}" if column.unit else column.title


def _label(points: Sequence[Point], axes: Axes) -> None:
    """Name each point, covering neither a point nor a bar."""
    bars = []
    for point in points:
        (before,), (after,) = _error(point.x)
        (below,), (above,) = _error(point.y)
        x, y = point.x.value, point.y.value
        lowest = y - below if below < y else y
        left, right = drawing.on_page(axes, (x - before, x + after), (y, y))
        bottom, top = drawing.on_page(axes, (x, x), (lowest, y + above))
        bars.append(Box(left[0], left[1] - 1.5, right[0], left[1] + 1.5))
        bars.append(Box(bottom[0] - 1.5, bottom[1], bottom[0] + 1.5, top[1]))
    drawing.name_points(axes, [(point.label, point.x.value, point.y.value) for point in points], bars)
