"""The report of a plan: its tables, and what became of its budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from layerfold.maths.intervals import Interval
from layerfold.planning import Budget, Evaluation, Planned
from layerfold.planning.results import LABEL
from layerfold.report import numerals
from layerfold.report import search_columns as columns
from layerfold.report.plan_plots import done, repaired_whole, trials_plot
from layerfold.report.report import (
    Card,
    Code,
    Column,
    Details,
    Figure,
    Line,
    Printed,
    Report,
    Section,
    Table,
    certain,
    counted,
    figures,
    sentence,
    shown,
    table_of,
)
from layerfold.report.search import INTERVALS, costs_section, environment_section, method_section, texts_line
from layerfold.settings import yaml_text

STANDINGS = ("", "front", "finalist", LABEL)


def plan_report(planned: Planned, recipe: dict[str, Any]) -> Report:
    """Return what a plan found: the front, what was built, and whether the budget is met.

    Args:
        recipe: the winner's, see `Planned.recipe`.
    """
    quartiles = "" if planned.winner.latency is None else "; quartiles below ms/token"
    check = columns.timing_check(planned.base_latency)
    printed: list[Printed] = [
        front_table(planned),
        winner_table(planned),
        Line(f"{INTERVALS}{quartiles}"),
        *([Line(check)] if check else []),
        Line(f"budget: {asked(planned.budget)}: {outcome(planned)}", ""),
        texts_line(planned),
    ]
    rows = [_row(planned, trial) for trial in planned.trials]
    return Report("plan", planned.model, _summary(planned), printed, rows, [*_sections(planned, recipe)])


def _sections(planned: Planned, recipe: dict[str, Any]) -> Iterator[Section]:
    everything = Details("All trials", [trials_table(planned)])
    yield Section("results", "Results", [winner_table(planned), front_table(planned), everything])
    plotted = (
        "Towards the lower left is better. The line is the front. What was planned, like every finalist, is repaired "
        "on more text than the trials on the front, and may lie below it."
    )
    yield costs_section("What being smaller costs", [trials_plot(planned)], plotted)
    method = (
        "Neurons are removed from all FFNs together until the size is reached. A budget of perplexity is searched for "
        "on the selection text, and verified on the test text."
    )
    yield method_section(planned, "what was planned", [Card([Line(method)], "Trials")])
    yield environment_section(planned, Details("Recipe of what was planned", [Code(yaml_text(recipe))]))


def _summary(planned: Planned) -> str:
    """Say what was asked for, what was found, what it costs, and whether the budget is met."""
    winner = planned.winner
    gone = 1 - winner.trial.parameters / planned.base.parameters
    speed = "" if winner.latency is None else f", at {numerals.times(winner.latency.speedup.value)} times its speed"
    return (
        f"Asked for: {asked(planned.budget)}. Found, of {counted(len(planned.trials), 'trial')}: {done(winner.trial)}. "
        f"It has {numerals.percent(gone)} fewer parameters than {planned.model}, and perplexity on the test text is "
        f"{numerals.times(winner.test.versus_base.value)} times the base's{speed}. "
        f"The budget is {outcome(planned)}.{sentence(columns.timing_check(planned.base_latency))}"
    )


def _row(planned: Planned, trial: Evaluation) -> dict[str, Figure]:
    size = (*COUNTS, columns.PARAMETERS, columns.DENSE, columns.COMPACT, columns.PERPLEXITY, *columns.CHANGES)
    return {
        "said": trial.said,
        "family": trial.family,
        "repair": trial.repair,
        "whole": trial.whole,
        "standing": standing(planned, trial),
        **figures((*size, *columns.TESTS, *columns.TIMES), planned, trial),
    }


def standing(planned: Planned, trial: Evaluation) -> str:
    """Return what became of a trial, see `STANDINGS`."""
    winner = planned.winner.trial
    if trial in (winner, replace(winner, whole=repaired_whole(winner))):
        return LABEL
    return "finalist" if trial.whole else "front" if trial in planned.front else ""


def front_table(planned: Planned) -> Table:
    """Return the original model and the front, largest first."""
    caption = (
        "The front: the model as it is, and the trials that no trial with as few parameters beats in perplexity on the "
        "selection text."
    )
    smaller = [trial for trial in planned.front if trial != planned.base]
    return _table(planned, (*COUNTS, *COMPARED), smaller, "front", caption)


def trials_table(planned: Planned) -> Table:
    """Return the original model and all trials, largest first."""
    caption = (
        "Perplexity is that of the selection text. Repairs are fitted to an eighth of the repair tokens, those of "
        "finalists to all."
    )
    tried = [trial for trial in planned.trials if trial != planned.base and trial.whole == repaired_whole(trial)]
    return _table(planned, (STANDING, *COUNTS, *COMPARED), tried, "trials", caption)


def winner_table(planned: Planned) -> Table:
    """Return the original model and the one that was built, with their figures on the test text."""
    times = () if planned.winner.latency is None else columns.TIMES
    caption = (
        "What was built, beside the model as it is. A figure on the test text, or a speed-up, stands above its 95% "
        "interval; a time, above its quartiles."
    )
    return _table(
        planned,
        (*SIZES, columns.BLOCKS, *columns.TESTS, *times),
        [planned.winner.trial],
        "winner",
        caption,
    )


def asked(budget: Budget) -> str:
    """Write the budget."""
    if budget.kind == "parameters":
        return f"at most {numerals.whole(budget.value)} parameters"
    if budget.kind == "perplexity":
        return f"perplexity at most {numerals.plain(budget.value)} times the base's"
    return f"at least {numerals.plain(budget.value)} times as fast"


def outcome(planned: Planned) -> str:
    """Write whether the budget is met, and the figure; of an estimate, whether its interval crosses the budget."""
    budget, winner = planned.budget, planned.winner
    met = "met with" if planned.met else "not met, with"
    if budget.kind == "parameters":
        return f"{met} {numerals.whole(winner.trial.parameters)}"
    if budget.kind == "perplexity":
        return f"{met} {_estimated(budget, winner.test.versus_base, ' on the test text')}"
    if winner.latency is None:
        return "not met: nothing was timed"
    return f"{met} {_estimated(budget, winner.latency.speedup)}"


def _estimated(budget: Budget, figure: Interval, of: str = "") -> str:
    cell = shown(figure, numerals.precise, True)
    met, ends = budget.meets(figure.value), [budget.meets(end) for end in (figure.low, figure.high)]
    beyond = "" if ends == [met, met] else ", which reaches beyond the budget" if met else ", which reaches within it"
    return f"{cell.value}{of}" + (f" (95% interval {cell.interval}{beyond})" if cell.interval else "")


def _table(planned: Planned, shown: Sequence[Column], trials: Sequence[Evaluation], name: str, caption: str) -> Table:
    ordered = [planned.base, *sorted(trials, key=lambda trial: (-trial.parameters, trial.perplexity))]
    return table_of(planned, shown, ordered, done, "what was done", planned.base, name, caption)


STANDING = Column(
    "standing", "standing", "", "whether it is on the front, was a finalist, or is what was planned",
    lambda planned, trial: certain(STANDINGS.index(standing(planned, trial))), lambda index: STANDINGS[int(index)],
)  # fmt: skip
COUNTS = (columns.BLOCKS, columns.NEURONS, columns.HEADS)
SIZES = (columns.PARAMETERS, columns.REMOVED, columns.DENSE, columns.COMPACT)
COMPARED = (*SIZES, columns.PERPLEXITY, columns.RATIO)
