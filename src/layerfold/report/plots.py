"""Scatter plots of one column against another, as SVG that stands inside an HTML page."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from layerfold.records import BASE_LABEL, Results
from layerfold.report import numerals
from layerfold.report.columns import Column
from layerfold.report.placement import Box, place
from layerfold.statistics import Interval

# Stand-ins that `_embed` replaces by the page's colours, so that one drawing follows the light and the dark scheme.
INK, MUTED, GRID, CARD = "#000001", "#000002", "#000003", "#000004"
SERIES = tuple(f"#00010{index}" for index in range(6))
PAGE_COLOURS = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)", CARD: "var(--card)"} | {
    colour: f"var(--series-{index})" for index, colour in enumerate(SERIES)
}
MARKERS = "osD^vPX"
SIZE = (5.5, 4.6)
FONT_SIZE = 9.5
LABEL_LENGTH = 22
# Further out the margins of a logarithmic axis overflow.
LIMIT = 1e100
STYLE = {
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": FONT_SIZE,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}


@dataclass(frozen=True)
class Plot:
    """A drawing for the page.

    Attributes:
        name: prefix of every id in the drawing.
        title: what is plotted against what.
        svg: an ``svg`` element; empty where no variant has both figures.
        note: what was left out, in sentences; empty where nothing was.
    """

    name: str
    title: str
    svg: str
    note: str


@dataclass(frozen=True)
class _Point:
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
        points.append(_Point(numerals.printable(label), family(results, label), across, up))
    notes = [
        f"{sentence}: {', '.join(map(numerals.printable, labels))}."
        for sentence, labels in (
            ("Not drawn, being out of the scale's range", left_out),
            ("Drawn without the bounds that are out of range", unbounded),
        )
        if labels
    ]
    return Plot(name, title, _draw(name, title, points, x, y) if points else "", " ".join(notes))


def family(results: Results, label: str) -> str:
    """Return what groups a variant with others: its method's name, or its label up to the first underscore."""
    if label == BASE_LABEL:
        return BASE_LABEL
    methods = (record.subject.get("method") for (owner, _), record in results.records.items() if owner == label)
    method = next((method for method in methods if method), None)
    if isinstance(method, dict):
        method = method.get("name")
    return numerals.printable(str(method or label.partition("_")[0] or label))


def _draw(name: str, title: str, points: Sequence[_Point], x: Column, y: Column) -> str:
    with matplotlib.style.context(["default", STYLE | {"svg.hashsalt": name}]), warnings.catch_warnings():
        # The page's fonts draw the text; that the one used for measuring lacks a glyph does not matter.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        figure = Figure(figsize=SIZE, dpi=72, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        _scatter(figure, axes, points)
        _scales(axes, points, x, y)
        canvas.draw()
        figure.set_layout_engine("none")
        _label(axes, points)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _embed(buffer.getvalue(), name, title)


def _scatter(figure: Figure, axes: Axes, points: Sequence[_Point]) -> None:
    families = [name for name in dict.fromkeys(point.family for point in points) if name != BASE_LABEL]
    handles: dict[str, Line2D] = {}
    for index, point in enumerate(points):
        if point.family == BASE_LABEL:
            colour, marker, size = INK, "*", 13.0
            axes.axhline(point.y.value, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        else:
            which = families.index(point.family)
            colour, marker, size = SERIES[which % len(SERIES)], MARKERS[which % len(MARKERS)], 6.5
        bars = axes.errorbar(
            point.x.value,
            point.y.value,
            xerr=_error(point.x),
            yerr=_error(point.y),
            color=colour,
            marker=marker,
            markersize=size,
            markeredgecolor=CARD,
            markeredgewidth=0.8,
            linestyle="",
            ecolor=colour,
            elinewidth=1.2,
            capsize=3,
            capthick=1.2,
            zorder=3 - index / len(points),
        )
        handles.setdefault(point.family, bars.lines[0])
    # Names are set afterwards: matplotlib takes text with dollars for mathematics and leaves out leading underscores.
    legend = figure.legend(list(handles.values()), ["-"] * len(handles), loc="outside upper center", ncols=4)
    for text, name in zip(legend.get_texts(), handles, strict=True):
        text.set_parse_math(False)
        text.set_text(_short(name))


def _error(interval: Interval) -> list[list[float]]:
    low, high = (bound if _in_range(bound) else interval.value for bound in (interval.low, interval.high))
    return [[max(0.0, interval.value - low)], [max(0.0, high - interval.value)]]


def _in_range(value: float) -> bool:
    return abs(value) < LIMIT


def _scales(axes: Axes, points: Sequence[_Point], x: Column, y: Column) -> None:
    axes.margins(0.12)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(y, value)))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(x, value)))
    axes.set_xlabel(_axis(x))
    axes.set_ylabel(f"{_axis(y)} (log scale)")
    axes.grid(visible=True)
    axes.set_axisbelow(True)


def _axis(column: Column) -> str:
    return f"{column.title}, {column.unit}" if column.unit else column.title


def _tick(column: Column, value: float) -> str:
    text = column.show(value)
    digits, suffix = (text[:-1], text[-1]) if text[-1:].isalpha() else (text, "")
    return (digits.rstrip("0").rstrip(".") if "." in digits and "e" not in digits else digits) + suffix


def _label(axes: Axes, points: Sequence[_Point]) -> None:
    def on_page(across: float, up: float) -> tuple[float, float]:
        where = axes.transData.transform((across, up))
        return float(where[0]), float(where[1])

    centres = [on_page(point.x.value, point.y.value) for point in points]
    # The reader's font is not known: this is wide for a sans serif.
    sizes = [(0.6 * FONT_SIZE * len(_short(point.label)), 1.15 * FONT_SIZE) for point in points]
    obstacles = [Box.around(*centre, 12, 12) for centre in centres]
    for point, centre in zip(points, centres, strict=True):
        (before,), (after,) = _error(point.x)
        ends = [on_page(point.x.value + shift, point.y.value)[0] for shift in (-before, after)]
        obstacles.append(Box(ends[0], centre[1] - 1.5, ends[1], centre[1] + 1.5))
        (below,), (above,) = _error(point.y)
        lowest = point.y.value - below if below < point.y.value else point.y.value
        ends = [on_page(point.x.value, end)[1] for end in (lowest, point.y.value + above)]
        obstacles.append(Box(centre[0] - 1.5, ends[0], centre[0] + 1.5, ends[1]))
    area = axes.bbox
    bounds = Box(area.x0 + 4, area.y0 + 2, area.x1, area.y1)
    for point, centre, target in zip(points, centres, place(centres, sizes, obstacles, bounds), strict=True):
        axes.annotate(
            _short(point.label),
            (point.x.value, point.y.value),
            xytext=(target[0] - centre[0], target[1] - centre[1]),
            textcoords="offset points",
            ha="center",
            va="center",
            parse_math=False,
            weight="bold" if point.label == BASE_LABEL else "normal",
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4},
            zorder=4,
        )


def _short(label: str) -> str:
    return label if len(label) <= LABEL_LENGTH else f"{label[: LABEL_LENGTH - 1]}…"


def _embed(svg: str, name: str, title: str) -> str:
    """Make matplotlib's document an element of a page that allows no inline style and has other drawings."""
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        given = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        for declaration in given.pop("style", "").split(";"):
            key, _, value = declaration.partition(":")
            if key.strip() and not key.strip().startswith("font-family"):
                given[key.strip()] = value.strip()
        element.attrib.clear()
        for key, value in given.items():
            element.set(key, _attribute(key, value, name))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", f"{title}; the figures are those of the table")
    return ElementTree.tostring(root, encoding="unicode")


def _attribute(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return value.replace("#", f"#{name}-")
    return PAGE_COLOURS.get(value, value.replace("url(#", f"url(#{name}-"))
