"""What the page's drawings share: one style, colours that the page sets, and SVG that stands inside HTML."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal, TypeVar
from xml.etree import ElementTree

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from layerfold.records import BASE_LABEL, Results
from layerfold.report import numerals
from layerfold.report.placement import Box, place
from layerfold.report.report import Plot

# Stand-ins that `_embed` replaces by the page's colours, so that one drawing follows the light and the dark scheme.
INK, MUTED, GRID, CARD = "#000001", "#000002", "#000003", "#000004"
SERIES = tuple(f"#00010{index}" for index in range(6))
PAGE_COLOURS = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)", CARD: "var(--card)"} | {
    colour: f"var(--series-{index})" for index, colour in enumerate(SERIES)
}
SIZE = (5.5, 4.6)
FONT_SIZE = 9.5
LABEL_LENGTH = 22
OUT_OF_RANGE = "Not drawn, being out of the scale's range"
# Of 1, 2 and 5 times the powers of ten, a logarithmic axis no longer than this factor may have one or none.
NARROW = 5.0
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

Ends = tuple[float, float]
Style = dict[str, Any]
"""How matplotlib draws a line and its markers."""

BASE_LINE: Style = {"color": MUTED, "linewidth": 0.8, "linestyle": (0, (4, 3)), "zorder": 1}
"""The style of the line at the base's figure."""

MARKERS = "osD^vPX"
MARKER: Style = {
    **{"linestyle": "", "marker": "o", "markersize": 6.5, "markeredgewidth": 0.8, "zorder": 3},
    "markeredgecolor": CARD,
}
BASE: Style = MARKER | {"marker": "*", "markersize": 13.0, "color": INK}
TABLE, TABLES = "the figures are those of the table", "the figures are those of the tables"

T = TypeVar("T")

STUDENT = "student"
"""The family of variants that learnt before they were recovered, whatever they were made by."""


def family(results: Results, label: str) -> str:
    """Return a variant's group: the name of its method, or its label up to the first underscore."""
    if label == BASE_LABEL:
        return BASE_LABEL
    subjects = [record.subject for (owner, _), record in results.records.items() if owner == label]
    if any({"distilled", "trained"} & subject.keys() for subject in subjects):
        return STUDENT
    method = next((subject["method"] for subject in subjects if subject.get("method")), None)
    if isinstance(method, dict):
        method = method.get("name")
    return numerals.printable(str(method or label.partition("_")[0] or label))


@dataclass(frozen=True)
class Axis:
    """A scale.

    Attributes:
        title: what stands beside it.
        show: writes its numbers.
        ends: None takes the range of the data, with a margin.
        whole: whether only whole numbers are written.
        margin: on either side, as a fraction of the range of the data.
    """

    title: str
    show: Callable[[float], str]
    ends: Ends | None = None
    whole: bool = False
    margin: float = 0.05


@dataclass(frozen=True)
class Chart:
    """What is drawn on one pair of axes, of which y is logarithmic.

    Attributes:
        paint: draws the data, and returns the styles that the legend explains, by name.
        label: writes labels after the layout, when positions on the page are known.
        figures: where the figures are, for readers who do not see the drawing.
        right: points to leave free beside the axes.
    """

    x: Axis
    y: Axis
    paint: Callable[[Axes], Mapping[str, Style]]
    label: Callable[[Axes], None]
    figures: str = TABLES
    right: float = 0.0


def plot(name: str, title: str, note: str, chart: Chart | None) -> Plot:
    """Return a plot that draws a chart when it is first shown; None if there is nothing to draw."""
    return Plot(name, title, None if chart is None else partial(_draw, chart, name, title), note)


def _draw(chart: Chart, name: str, title: str) -> str:
    with matplotlib.style.context(["default", STYLE | {"svg.hashsalt": name}]), warnings.catch_warnings():
        # The page's fonts draw the text; that the one used for measuring lacks a glyph does not matter.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        layout = ConstrainedLayoutEngine(rect=(0, 0, 1 - chart.right / (72 * SIZE[0]), 1))
        figure = Figure(figsize=SIZE, dpi=72, layout=layout)
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        _legend(figure, chart.paint(axes))
        _scales(axes, chart.x, chart.y)
        canvas.draw()
        figure.set_layout_engine("none")
        chart.label(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _embed(buffer.getvalue(), name, f"{title}; {chart.figures}")


def _scales(axes: Axes, x: Axis, y: Axis) -> None:
    axes.margins(x.margin, y.margin)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > NARROW * low else MaxNLocator(6))
    axes.yaxis.set_minor_locator(NullLocator())
    whole = MaxNLocator(12, integer=True, min_n_ticks=1)
    axes.xaxis.set_major_locator(whole if x.whole else MaxNLocator(6, steps=[1, 2, 5, 10]))
    for axis, drawn in ((x, axes.xaxis), (y, axes.yaxis)):
        drawn.set_major_formatter(FuncFormatter(lambda value, _, show=axis.show: _tick(show, value)))
    axes.set_xlabel(x.title)
    axes.set_ylabel(f"{y.title} (log scale)")
    axes.grid(visible=True)
    axes.set_axisbelow(True)
    if x.ends:
        axes.set_xlim(*x.ends)
    if y.ends:
        axes.set_ylim(*y.ends)


def _legend(figure: Figure, entries: Mapping[str, Style]) -> None:
    """Explain styles above the axes, those without a colour in grey."""
    if not entries:
        return
    grey: Style = {"color": MUTED}
    lines = [Line2D([], [], **grey | style) for style in entries.values()]
    # Names are set afterwards: matplotlib takes text with dollars for mathematics and leaves out leading underscores.
    made = figure.legend(lines, ["-"] * len(entries), loc="outside upper center", ncols=4)
    for text, name in zip(made.get_texts(), entries, strict=True):
        text.set_parse_math(False)
        text.set_text(short(name))


def annotate(
    axes: Axes,
    label: str,
    point: tuple[float, float],
    offset: tuple[float, float],
    align: Literal["left", "center"] = "center",
    colour: str = INK,
) -> None:
    """Write a variant's label at an offset from its marker, in points, with a line between the two."""
    leader = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
    axes.annotate(
        short(label),
        point,
        xytext=offset,
        textcoords="offset points",
        ha=align,
        va="center",
        parse_math=False,
        color=colour,
        weight="bold" if label == BASE_LABEL else "normal",
        arrowprops=leader | {"relpos": (0.0 if align == "left" else 0.5, 0.5)},
        zorder=4,
    )


def series(index: int) -> Style:
    """Return the style of the markers of one family among several."""
    return MARKER | {"color": SERIES[index % len(SERIES)], "marker": MARKERS[index % len(MARKERS)]}


def panels(lines: Sequence[T]) -> list[Sequence[T]]:
    """Divide lines evenly among the fewest drawings that have a colour for each."""
    size = math.ceil(len(lines) / math.ceil(len(lines) / len(SERIES))) if lines else 1
    return [lines[start : start + size] for start in range(0, len(lines), size)]


def name_points(
    axes: Axes,
    points: Sequence[tuple[str, float, float]],
    obstacles: Sequence[Box],
    colours: Sequence[str] | None = None,
) -> None:
    """Write labels beside points of the data, so that they cover no marker and no obstacle."""
    across, up = [x for _, x, _ in points], [y for _, _, y in points]
    centres = on_page(axes, across, up)
    sizes = [(width(label), 1.15 * FONT_SIZE) for label, _, _ in points]
    area = axes.bbox
    bounds = Box(area.x0 + 4, area.y0 + 2, area.x1, area.y1)
    targets = place(centres, sizes, [*boxes(axes, across, up, 12), *obstacles], bounds)
    shown = colours or [INK] * len(points)
    for (label, *point), centre, target, colour in zip(points, centres, targets, shown, strict=True):
        offset = target[0] - centre[0], target[1] - centre[1]
        annotate(axes, label, (point[0], point[1]), offset, colour=colour)


def on_page(axes: Axes, across: Sequence[float], up: Sequence[float]) -> list[tuple[float, float]]:
    """Return where points of the data stand on the page, in points."""
    where = (axes.transData.transform(point) for point in zip(across, up, strict=True))
    return [(float(x), float(y)) for x, y in where]


def boxes(axes: Axes, across: Sequence[float], up: Sequence[float], size: float = 10) -> list[Box]:
    """Return the boxes of markers, in points, which labels must not cover."""
    return [Box.around(x, y, size, size) for x, y in on_page(axes, across, up)]


def steps_of(axes: Axes, across: Sequence[float], up: Sequence[float]) -> list[Box]:
    """Return the boxes of a line that falls in steps, in points, which labels must not cover."""
    corners = on_page(axes, across, up)
    return [
        box
        for (x, y), (next_x, next_y) in pairwise(corners)
        for box in (Box(x, y - 1, next_x, y + 1), Box(next_x - 1, next_y, next_x + 1, y))
    ]


def left_out(*reasons: tuple[str, Sequence[str]]) -> str:
    """Write a drawing's note: what is not drawn, by reason; a reason without names is left out."""
    return " ".join(f"{reason}: {', '.join(names)}." for reason, names in reasons if names)


def width(label: str) -> float:
    """Return the width of a label, in points."""
    # The reader's font is not known: this is wide for a sans serif.
    return 0.6 * FONT_SIZE * len(short(label))


def short(label: str) -> str:
    """Return a label cut to the length that a drawing has room for."""
    return label if len(label) <= LABEL_LENGTH else f"{label[: LABEL_LENGTH - 1]}…"


def _tick(show: Callable[[float], str], value: float) -> str:
    text = show(value)
    digits, suffix = (text[:-1], text[-1]) if text[-1:].isalpha() else (text, "")
    return (digits.rstrip("0").rstrip(".") if "." in digits and "e" not in digits else digits) + suffix


def _embed(svg: str, name: str, description: str) -> str:
    """Turn matplotlib's document into an element for a page with other drawings and without inline styles."""
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
    root.set("aria-label", description)
    return ElementTree.tostring(root, encoding="unicode")


def _attribute(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return value.replace("#", f"#{name}-")
    return PAGE_COLOURS.get(value, value.replace("url(#", f"url(#{name}-"))
