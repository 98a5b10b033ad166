"""The tables of a plan, and what became of its budget, as the terminal and the page read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from layerfold.maths.intervals import Interval
from layerfold.planning import Budget, Evaluation, Planned
from layerfold.planning.results import LABEL
from layerfold.report import numerals
from layerfold.report.search import (
    MILLISECONDS,
    PARAMETERS,
    PERPLEXITY,
    RATIO,
    REMOVED,
    SPEEDUP,
    TEST_PERPLEXITY,
    TEST_RATIO,
    AnyColumn,
    SearchColumn,
    cells,
    certain,
)
from layerfold.report.tables import Table, shown
from layerfold.search.results import HeldOutScore, Timing

PlanColumn = SearchColumn[Planned, Evaluation]

STANDINGS = ("", "front", "finalist", LABEL)


def done(trial: Evaluation) -> str:
    """Write what was done, and whether it was repaired on all of the text that there is for that."""
    return trial.said + (" on all text" if repaired_whole(trial) else "")


def repaired_whole(trial: Evaluation) -> bool:
    """Whether it was repaired on all of the text; a finalist that is not repaired is no other than it was before."""
    return trial.whole and trial.repair != "none"


def standing(planned: Planned, trial: Evaluation) -> str:
    """Return what became of a trial; nothing where nothing did."""
    winner = planned.winner.trial
    if trial in (winner, replace(winner, whole=repaired_whole(winner))):
        return LABEL
    return "finalist" if trial.whole else "front" if trial in planned.front else ""


def held_out(planned: Planned, trial: Evaluation) -> HeldOutScore | None:
    """Return what a trial comes to on the test text, or None where it was not measured on it."""
    tests = (planned.base, planned.base_test), (planned.winner.trial, planned.winner.test)
    return next((measured for each, measured in tests if each == trial), None)


def latency(planned: Planned, trial: Evaluation) -> Timing | None:
    """Return how fast what a trial made is, or None where it was not timed."""
    timed = (planned.base, planned.base_latency), (planned.winner.trial, planned.winner.latency)
    return next((timing for each, timing in timed if each == trial), None)


def front_table(planned: Planned) -> Table:
    """Return the model as it is, and the best of what is smaller, the largest first."""
    columns: tuple[PlanColumn, ...] = (BLOCKS, NEURONS, HEADS, PARAMETERS, REMOVED, PERPLEXITY, RATIO)
    return _table(planned, columns, [planned.base, *(trial for trial in planned.front if trial != planned.base)])


def trials_table(planned: Planned) -> Table:
    """Return the model as it is, and all that was tried, the largest first."""
    columns: tuple[PlanColumn, ...] = (STANDING, BLOCKS, NEURONS, HEADS, PARAMETERS, REMOVED, PERPLEXITY, RATIO)
    tried = [trial for trial in planned.trials if trial != planned.base and trial.whole == repaired_whole(trial)]
    return _table(planned, columns, [planned.base, *tried])


def winner_table(planned: Planned) -> Table:
    """Return the model as it is, and what was built of it, with what they come to on the test text."""
    timed: tuple[AnyColumn, ...] = () if planned.winner.latency is None else TIMES
    columns: tuple[PlanColumn, ...] = (PARAMETERS, REMOVED, BLOCKS, *TESTS, *timed)
    return _table(planned, columns, [planned.base, planned.winner.trial])


def asked(budget: Budget) -> str:
    """Write what had to be met."""
    if budget.kind == "parameters":
        return f"at most {numerals.whole(budget.value)} parameters"
    if budget.kind == "perplexity":
        return f"perplexity at most {numerals.plain(budget.value)} times the base's"
    return f"at least {numerals.plain(budget.value)} times as fast"


def outcome(planned: Planned) -> str:
    """Write whether the budget is met and with what; of an estimate, whether its interval says otherwise too."""
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


def _table(planned: Planned, columns: Sequence[PlanColumn], trials: Sequence[Evaluation]) -> Table:
    base, *others = trials
    ordered = [base, *sorted(others, key=lambda trial: (-trial.parameters, trial.perplexity))]
    rows = [(done(trial), cells(planned, trial, columns)) for trial in ordered]
    return Table("what was done", planned.base.said, columns, rows)


def _tested(name: str) -> Callable[[Planned, Evaluation], Interval | None]:
    return lambda planned, trial: getattr(held_out(planned, trial), name, None)


def _timed(name: str) -> Callable[[Planned, Evaluation], Interval | None]:
    return lambda planned, trial: getattr(latency(planned, trial), name, None)


BLOCKS: PlanColumn = SearchColumn(
    "blocks", "", "how many blocks it has", lambda _, trial: certain(trial.blocks), numerals.whole
)
NEURONS: PlanColumn = SearchColumn(
    "neurons", "", "how many neurons its FFNs have together", lambda _, trial: certain(trial.neurons), numerals.whole
)
HEADS: PlanColumn = SearchColumn(
    "heads", "", "how many heads of keys and values its attentions have together",
    lambda _, trial: certain(trial.heads), numerals.whole,
)  # fmt: skip
STANDING: PlanColumn = SearchColumn(
    "standing", "", "whether it is on the front, was a finalist, or is what was planned",
    lambda planned, trial: certain(STANDINGS.index(standing(planned, trial))), lambda index: STANDINGS[int(index)],
)  # fmt: skip
TESTS = tuple(
    replace(column, read=_tested(name))
    for column, name in ((TEST_PERPLEXITY, "perplexity"), (TEST_RATIO, "versus_base"))
)
TIMES = tuple(
    replace(column, read=_timed(name)) for column, name in ((MILLISECONDS, "milliseconds"), (SPEEDUP, "speedup"))
)
