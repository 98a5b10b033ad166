"""The drawing of a plan: what was tried, the front, and the budget."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from layerfold.planning import Evaluation, Planned
from layerfold.planning.results import LABEL
from layerfold.records import BASE_LABEL
from layerfold.report import drawing, numerals
from layerfold.report.drawing import Style
from layerfold.report.placement import Box
from layerfold.report.plots import LIMIT
from layerfold.report.report import TIMES_BASE, Plot
from layerfold.report.search_plots import FRONT, REACH, in_range

TITLE = "Perplexity against parameters"
# In the order of their colours, which are the same on every page.
FAMILIES = ("drop + prune", "drop", "prune", "collapse", "merge", "share")
LINE = FRONT | {"marker": "", "color": drawing.MUTED}
RING: Style = {"markerfacecolor": "none", "markeredgecolor": drawing.INK}
WINNER = drawing.MARKER | RING | {"color": drawing.INK, "markersize": 13.0, "markeredgewidth": 1.6}
HOLLOW: Style = {"markerfacecolor": drawing.CARD, "markeredgewidth": 1.2}
BUDGET: Style = {"linewidth": 1.2, "linestyle": (0, (4, 3)), "zorder": 1}


def done(trial: Evaluation) -> str:
    """Write what was done, and whether the repair was fitted to all of the text."""
    return trial.said + (" on all text" if repaired_whole(trial) else "")


def repaired_whole(trial: Evaluation) -> bool:
    """Whether a repair was fitted to all of the text; without a repair a finalist is the same as its trial."""
    return trial.whole and trial.repair != "none"


def trials_plot(planned: Planned) -> Plot:
    """Draw perplexity on the selection text against parameters, with the front, the budget and what was planned."""
    shown = [each.perplexity for each in (planned.base, planned.winner.trial) if in_range(each.perplexity)]
    top = REACH * max(shown, default=0.0)
    tried = list(dict.fromkeys((planned.base, *planned.trials, planned.winner.trial)))
    drawn = [trial for trial in tried if 1 / LIMIT < trial.perplexity <= top]
    left_out = "; ".join(dict.fromkeys(numerals.printable(done(trial)) for trial in tried if trial not in drawn))
    ends = f", which ends at {numerals.significant(top)}" if shown else ""
    note = f"Not drawn, being out of the scale{ends}: {left_out}." if left_out else ""
    return drawing.plot("trials", TITLE, note, _chart(planned, drawn) if drawn else None)


def _chart(planned: Planned, drawn: Sequence[Evaluation]) -> drawing.Chart:
    base, winner = planned.base, planned.winner.trial
    front = [trial for trial in planned.front if trial in drawn]
    named = [(trial, name) for trial, name in ((base, BASE_LABEL), (winner, LABEL)) if trial in drawn]

    def paint(axes: Axes) -> dict[str, Style]:
        entries = _scatter(axes, [trial for trial in drawn if trial != base])
        axes.plot(*_at(front), **LINE)
        for style, trial in ((drawing.BASE, base), (WINNER, winner)):
            axes.plot(*_at([trial] if trial in drawn else []), **style)
        _rule(planned, axes)
        return entries | {"front": LINE}

    def label(axes: Axes) -> None:
        points = [(name, float(trial.parameters), trial.perplexity) for trial, name in named]
        limit, rule = _ruled(planned, axes)
        obstacles = [*drawing.boxes(axes, *_at(drawn)), *rule, *drawing.steps_of(axes, *_at(front))]
        drawing.name_points(axes, [*points, *limit], obstacles)

    x = drawing.Axis("parameters", numerals.count, margin=0.12)
    y = drawing.Axis("perplexity on the selection text", numerals.precise, margin=0.12)
    return drawing.Chart(x, y, paint, label)


def _scatter(axes: Axes, trials: Sequence[Evaluation]) -> dict[str, Style]:
    """Draw trials, with a marker for each family, hollow without a repair; return the legend's entries."""
    entries: dict[str, Style] = {}
    for index, family in enumerate(dict.fromkeys((*FAMILIES, *(trial.family for trial in trials)))):
        own = [trial for trial in trials if trial.family == family]
        solid = drawing.series(index)
        for style, repaired in ((solid | HOLLOW | {"markeredgecolor": solid["color"]}, False), (solid, True)):
            axes.plot(*_at([trial for trial in own if (trial.repair != "none") is repaired]), **style)
        if own:
            entries[numerals.printable(family)] = solid
    if any(trial.repair == "none" for trial in trials):
        entries["not repaired"] = drawing.MARKER | HOLLOW | {"markeredgecolor": drawing.MUTED}
    return entries


def _rule(planned: Planned, axes: Axes) -> None:
    """Draw the budget as a line; a budget of speed has none."""
    budget = planned.budget
    if budget.kind == "parameters":
        axes.axvline(budget.value, color=drawing.INK, **BUDGET)
    elif budget.kind == "perplexity" and in_range(planned.base.perplexity):
        axes.axhline(budget.value * planned.base.perplexity, color=drawing.INK, **BUDGET)


def _ruled(planned: Planned, axes: Axes) -> tuple[list[tuple[str, float, float]], list[Box]]:
    """Return the budget's label with its point, and the boxes of its line, which labels must not cover."""
    budget, area, limit = planned.budget, axes.bbox, planned.budget.value
    to_data = axes.transData.inverted().transform
    if budget.kind == "parameters":
        ((x, _),) = drawing.on_page(axes, [limit], [planned.base.perplexity])
        # Near the bottom, where a label beside the line has room.
        _, low = to_data((x, area.y0 + drawing.FONT_SIZE))
        return [(f"budget: {numerals.count(limit)}", limit, float(low))], [Box(x - 1.5, area.y0, x + 1.5, area.y1)]
    limit *= planned.base.perplexity
    if budget.kind == "perplexity" and in_range(limit):
        name = f"budget: {numerals.plain(budget.value)} {TIMES_BASE}"
        ((_, y),) = drawing.on_page(axes, [planned.base.parameters], [limit])
        # So far from the left that a label below or above it has room.
        near, _ = to_data((area.x0 + 8 + drawing.width(name) / 2, y))
        return [(name, float(near), limit)], [Box(area.x0, y - 1.5, area.x1, y + 1.5)]
    return [], []


def _at(trials: Sequence[Evaluation]) -> tuple[list[int], list[float]]:
    return [trial.parameters for trial in trials], [trial.perplexity for trial in trials]
