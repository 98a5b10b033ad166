"""Plots of README and docs, drawn from the results: the same results make the same file."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from figures.experiments import EXPERIMENTS, ROOT
from layerfold.files import write_text

FOLDER = ROOT / "docs" / "plots"
COLOURS = ("#2458a6", "#b4530a", "#187a3c", "#7a3fc0", "#b71c4a", "#0c6f6c", "#8a6d00", "#5d636d", "#1b1d21")
MARKERS = "os^Dv<>PX"
TITLES = {"perplexity": "no training", "recovered": "after the same distillation"}
_TOP = 40.0
"""Where a plot ends: at so many times the base's perplexity. A table can say how far above a useless model is."""


def draw_all() -> None:
    """Draw every plot whose results there are."""
    for path, svg in _drawn():
        write_text(path, svg)


def stale() -> Iterator[str]:
    """Yield the plots that are not what the results say."""
    for path, svg in _drawn():
        if not path.is_file() or path.read_text(encoding="utf-8") != svg:
            yield str(path.relative_to(ROOT))


def _drawn() -> Iterator[tuple[Path, str]]:
    for name, (experiment, draw) in PLOTS.items():
        found = EXPERIMENTS[experiment].stored()
        if found is not None:
            yield FOLDER / f"{name}.svg", _svg(draw, found, name)


def _svg(draw: Callable[[Figure, Mapping[str, Any]], None], found: Mapping[str, Any], name: str) -> str:
    # Text stays text, and ids are those of the name.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure = Figure(layout="constrained")
        canvas = FigureCanvasSVG(figure)
        draw(figure, found)
        text = io.StringIO()
        canvas.print_svg(text, metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def _quality(figure: Figure, found: Mapping[str, Any]) -> None:
    """Perplexity against parameters other than zero, a line a method: before training, and after it where there is."""
    names = [name for name in TITLES if sum(name in row for row in found["rows"]) > 1]
    figure.set_size_inches(6.4 * len(names), 5.2)
    for place, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), place + 1)
        _methods(axes, found, name)
        axes.set_title(TITLES[name], fontsize=10)
        if not place:
            axes.set_ylabel(f"test perplexity (log scale, to {_TOP:.0f} times the base's)")
            figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)


def _methods(axes: Axes, found: Mapping[str, Any], name: str) -> None:
    base, *rows = found["rows"]
    value = base["perplexity"]["value"]
    axes.axhline(value, color="#5d636d", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    axes.plot([base["parameters"] / 1e6], [value], "*", color="#1b1d21", markersize=12, label="base")
    for index, (method, about) in enumerate(found["methods"].items()):
        own = sorted((row for row in rows if row["method"] == method and name in row), key=lambda row: row["nonzero"])
        if not own:
            continue
        values = np.array([[row[name][each] for each in ("value", "low", "high")] for row in own])
        axes.errorbar(
            [row["nonzero"] / 1e6 for row in own],
            values[:, 0],
            yerr=np.abs(values[:, 1:] - values[:, :1]).T,
            color=COLOURS[index],
            marker=MARKERS[index],
            markersize=5,
            linewidth=1.3 if index else 2.4,
            linestyle=(0, (3, 2)) if about["zeros"] else "-",
            capsize=2,
            label=about["title"] + (" (zeros)" if about["zeros"] else ""),
            zorder=3 if index else 4,
        )
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high > (top := _TOP * value):
        axes.set_ylim(low, top)
        high = top
    _logarithmic(axes, low, high)
    axes.set_xlabel("parameters other than zero, millions")


def _one_block(figure: Figure, found: Mapping[str, Any]) -> None:
    """Perplexity without each block, in multiples of the whole model's."""
    figure.set_size_inches(6.4, 3.6)
    axes = figure.add_subplot()
    base = found["base"]["perplexity"]
    single = sorted(found["candidates"]["1"], key=lambda each: int(each["removed"][0]))
    axes.bar([each["removed"][0] for each in single], [each["perplexity"] / base for each in single], color=COLOURS[0])
    axes.set_yscale("log")
    _logarithmic(axes, *axes.get_ylim())
    axes.set_xticks([each["removed"][0] for each in single])
    axes.set_xlabel("block removed")
    axes.set_ylabel("perplexity / the whole model's (log scale)")


def _logarithmic(axes: Axes, low: float, high: float) -> None:
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 5 * low else MaxNLocator(6))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.grid(visible=True, linewidth=0.5, color="#dfe1e5")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


PLOTS: dict[str, tuple[str, Callable[[Figure, Mapping[str, Any]], None]]] = {
    "quality": ("quality", _quality),
    "quality-smollm2": ("quality-smollm2", _quality),
    "one-block": ("drop-sets", _one_block),
}
"""The experiment that a plot shows, and what draws it, by the plot's name."""
