"""The table and the plot of a comparison of methods at several sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray
from peers import Peer, budget

from layerfold.files import replacing
from layerfold.maths.intervals import Interval, exponential, ratio_interval
from layerfold.model.decoder import Decoder

COLOURS = ("#2458a6", "#b4530a", "#187a3c", "#7a3fc0", "#b71c4a", "#0c6f6c", "#8a6d00", "#5d636d", "#1b1d21")
MARKERS = "os^Dv<>PX"
TITLES = {"perplexity": "no training", "recovered": "the same recovery for all"}
_TOP = 40.0
"""Where a plot ends: at so many times the base's perplexity. How far above a useless model is, a table can tell."""

ZEROS = "zeros: no smaller in memory unless stored compactly"


def paired(one: Any, two: Any, tokens: NDArray[np.float64]) -> Interval:
    """One perplexity over another with its 95 % interval, from the same documents."""
    difference = np.array(one.nats) - np.array(two.nats)
    return ratio_interval(difference, tokens).map(exponential)


def markdown(
    rows: Sequence[Any], name: str, methods: Mapping[str, Peer], base: Decoder, tokens: NDArray[np.float64]
) -> str:
    """A table of methods by sizes; the lowest of each size is bold, among all and among those that hold no zeros.

    Args:
        rows: the base first.
        name: ``perplexity`` or ``recovered``.
        tokens: (documents,), scored in each.
    """
    by_place = {(row.method, row.kept): row for row in rows[1:]}
    sizes = [kept for kept in dict.fromkeys(kept for _, kept in by_place) if _there(rows, kept, name)]
    used = [method for method in methods if any(method == owner for owner, _ in by_place)]
    best = {(kept, zeros): ranked(rows, kept, name, methods, zeros) for kept in sizes for zeros in (False, True)}
    lines = [
        ["size of", *(f"{kept} blocks" for kept in sizes)],
        ["---"] * (len(sizes) + 1),
        ["parameters", *(f"{budget(base, kept) / 1e6:.2f}M" for kept in sizes)],
    ]
    for method in used:
        cells = []
        for kept in sizes:
            row = by_place.get((method, kept))
            text = "" if row is None else "cannot reach" if row.parameters is None else cell_text(getattr(row, name))
            lowest = {best[kept, zeros][0].method for zeros in (False, True) if best[kept, zeros]}
            cells.append(f"**{text}**" if text and method in lowest and row.parameters is not None else text)
        lines.append([methods[method].title + (" (zeros)" if methods[method].zeros else ""), *cells])
    for zeros, said in ((False, "lowest, smaller in memory"), (True, "lowest of all")):
        if zeros and not any(methods[method].zeros for method in used):
            continue
        lines.append([said, *(winner(best[kept, zeros], name, tokens) for kept in sizes)])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    base_text = cell_text(rows[0].perplexity)
    return f"{table}\n\nBase: {base_text}, {rows[0].parameters / 1e6:.2f}M parameters. ({ZEROS})"


def _there(rows: Sequence[Any], kept: int, name: str) -> bool:
    return name == "perplexity" or any(getattr(row, name) for row in rows if row.kept == kept)


def ranked(rows: Sequence[Any], kept: int, name: str, methods: Mapping[str, Peer], zeros: bool) -> list[Any]:
    """Rows of a size that have a figure, lowest first; those that hold zeros only where asked for."""
    here = [row for row in rows[1:] if row.kept == kept and getattr(row, name) is not None]
    allowed = [row for row in here if zeros or not methods[row.method].zeros]
    return sorted(allowed, key=lambda row: getattr(row, name).value)


def winner(best: Sequence[Any], name: str, tokens: NDArray[np.float64]) -> str:
    """Name the lowest, and those whose paired quotient over it may as well be 1."""
    if not best:
        return ""
    lowest = getattr(best[0], name)
    as_good = [row.method for row in best[1:] if paired(getattr(row, name), lowest, tokens).low <= 1]
    return best[0].method + (f"; not told apart: {', '.join(as_good)}" if as_good else "")


def cell_text(measured: Any) -> str:
    """A perplexity to three or more digits; nothing where there is none."""
    if measured is None:
        return ""
    return f"{measured.value:,.1f}" if measured.value < 1000 else f"{measured.value:,.0f}"


def plot(rows: Sequence[Any], methods: Mapping[str, Peer], path: Path) -> None:
    """Draw perplexity against parameters other than zero, a line a method: before and, where there is one, after it."""
    names = [name for name in TITLES if any(getattr(row, name) for row in rows[1:])]
    # Text stays text, and the same figures make the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "quality"}):
        figure = Figure(figsize=(6.4 * len(names), 5.2), layout="constrained")
        canvas = FigureCanvasSVG(figure)
        for place, name in enumerate(names):
            axes = figure.add_subplot(1, len(names), place + 1)
            _lines(axes, rows, name, methods)
            axes.set_title(TITLES[name], fontsize=10)
            if not place:
                axes.set_ylabel(f"test perplexity (log scale, to {_TOP:.0f} times the base's)")
                figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
        with replacing(path) as temporary:
            canvas.print_svg(temporary, metadata={"Date": None})


def _lines(axes: Axes, rows: Sequence[Any], name: str, methods: Mapping[str, Peer]) -> None:
    base = rows[0]
    axes.axhline(base.perplexity.value, color="#5d636d", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    axes.plot([base.parameters / 1e6], [base.perplexity.value], "*", color="#1b1d21", markersize=12, label="base")
    for index, (method, peer) in enumerate(methods.items()):
        found = [row for row in rows[1:] if row.method == method and getattr(row, name) is not None]
        if not found:
            continue
        found.sort(key=lambda row: row.nonzero)
        values = np.array(
            [[getattr(row, name).value, getattr(row, name).low, getattr(row, name).high] for row in found]
        )
        axes.errorbar(
            [row.nonzero / 1e6 for row in found],
            values[:, 0],
            yerr=np.abs(values[:, 1:] - values[:, :1]).T,
            color=COLOURS[index],
            marker=MARKERS[index],
            markersize=5,
            linewidth=2.4 if not index else 1.3,
            linestyle=(0, (3, 2)) if peer.zeros else "-",
            capsize=2,
            label=peer.title + (" (zeros)" if peer.zeros else ""),
            zorder=4 if not index else 3,
        )
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high > (top := _TOP * base.perplexity.value):
        axes.set_ylim(low, top)
        high = top
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 5 * low else MaxNLocator(6))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("parameters other than zero, millions")
    axes.grid(visible=True, linewidth=0.5, color="#dfe1e5")
    axes.spines[["top", "right"]].set_visible(False)
