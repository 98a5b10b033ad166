"""A report: what a study, a search or a plan found, in parts that the terminal, the page and the CSV file print."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import Any, Literal

from layerfold.maths.intervals import Interval
from layerfold.report.numerals import significant

DASH = "\N{EN DASH}"
PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
TIMES_BASE = "\N{MULTIPLICATION SIGN} base"

MISSING = DASH
"""What stands where nothing was measured."""

Direction = Literal["lower", "higher", ""]

Figure = str | float | Decimal | None
"""What a CSV file holds of a row under one header."""


@dataclass(frozen=True)
class Cell:
    """One figure as it is shown: the value, and its interval (empty where the value has none)."""

    value: str
    interval: str


@dataclass(frozen=True)
class Column:
    """One figure of every row: the one definition that all media read.

    Attributes:
        name: the header in the CSV file.
        title, unit: the two lines of the header for people.
        meaning: what the figure is, in a phrase.
        read: returns the figure of a row of a result, or None where it has not been measured.
        show: writes a number of this column for people.
        better: which direction is better, where one is.
        interval: whether the figure has bounds.
        group: columns of one group stay together.
    """

    name: str
    title: str
    unit: str
    meaning: str
    read: Callable[[Any, Any], Interval | None]
    show: Callable[[float], str] = significant
    better: Direction = ""
    interval: bool = False
    group: str = ""

    def cell(self, result: Any, row: Any) -> Cell:
        """Return the figure of a row as it is shown."""
        return shown(self.read(result, row), self.show, self.interval)


@dataclass(frozen=True)
class Table:
    """Columns with their cells, by label.

    Attributes:
        header: what stands above the labels.
        base: the label of the row that the others are compared with.
        columns, rows: headers, and cells by label.
        name, caption: what the page calls the table, and says above it.
    """

    header: str
    base: str
    columns: Sequence[Column]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    name: str = ""
    caption: str = ""


@dataclass(frozen=True)
class Line:
    """A paragraph, after its title where it has one."""

    text: str
    style: Literal["", "note", "warning", "heading"] = "note"
    title: str = ""


@dataclass(frozen=True)
class Listing:
    """Names with their values, as shown."""

    entries: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Plot:
    """A drawing.

    Attributes:
        name: prefix of every id in the drawing.
        title: what is plotted against what.
        draw: returns the drawing as an ``svg`` element; None where nothing can be drawn.
        note: what was left out, in sentences; empty where nothing was.
    """

    name: str
    title: str
    draw: Callable[[], str] | None
    note: str

    @cached_property
    def svg(self) -> str:
        """The drawing, made when it is first asked for; empty where nothing can be drawn."""
        return self.draw() if self.draw else ""


@dataclass(frozen=True)
class Plots:
    """Drawings side by side; `nothing` says why one is empty, and `wide` is for those that may stand alone."""

    plots: Sequence[Plot]
    nothing: str
    wide: bool = True


@dataclass(frozen=True)
class Sample:
    """What a variant wrote after a prompt, how its tokens were chosen, and the share of it that is repeated."""

    label: str
    choice: str
    text: str
    repeated: str


@dataclass(frozen=True)
class Samples:
    """Prompts with what every variant wrote after each; `base` is the label that the others are compared with."""

    prompts: Sequence[tuple[str, Sequence[Sample]]]
    base: str


@dataclass(frozen=True)
class Pair:
    """A block matched to an anchor: the mean correlation of their neurons, and that without alignment."""

    anchor: int
    correlation: float
    unaligned: float

    @property
    def tenth(self) -> int:
        """The correlation in tenths, 0 to 10, for shading."""
        return round(10 * self.correlation) if 0 <= self.correlation <= 1 else 0


@dataclass(frozen=True)
class Pairs:
    """The pairs of every variant that has any, by label and block; anchors is what each variant matched to."""

    blocks: Sequence[int]
    rows: Mapping[str, Mapping[int, Sequence[Pair]]]
    anchors: Mapping[str, frozenset[int]]


@dataclass(frozen=True)
class Code:
    """Text that keeps its lines."""

    text: str


@dataclass(frozen=True)
class Card:
    """Parts that stand in a frame, under a title and what belongs beside it where there are any."""

    parts: Sequence[Part]
    title: str = ""
    beside: str = ""


@dataclass(frozen=True)
class Cards:
    """Cards side by side."""

    cards: Sequence[Card]


@dataclass(frozen=True)
class Details:
    """Parts that the reader opens."""

    title: str
    parts: Sequence[Part]


Printed = Line | Table | Samples
Part = Line | Table | Listing | Plots | Samples | Pairs | Code | Cards | Details


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading of its own; the name is its id."""

    name: str
    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Report:
    """What a result shows.

    Attributes:
        kind, title, summary: what stands at the head of the page.
        printed: what the terminal prints.
        rows: what the CSV file holds, unrounded: figures by header.
        sections: of the page.
    """

    kind: str
    title: str
    summary: str
    printed: Sequence[Printed]
    rows: Sequence[Mapping[str, Figure]]
    sections: Sequence[Section]


def certain(value: float) -> Interval:
    """Return a figure that has no bounds."""
    return Interval(value, value, value)


def table_of(
    result: Any,
    columns: Sequence[Column],
    rows: Iterable[Any],
    label: Callable[[Any], str],
    header: str,
    base: Any,
    name: str,
    caption: str,
) -> Table:
    """Return columns of a result as a table, see `Table`.

    Args:
        label: returns the label of a row.
        base: the row that the others are compared with.
    """
    shown = [(label(row), [column.cell(result, row) for column in columns]) for row in rows]
    return Table(header, label(base), columns, shown, name, caption)


def figures(columns: Iterable[Column], result: Any, row: Any, deviations: bool = False) -> dict[str, Figure]:
    """Return the figures of a row as the CSV file holds them, bounds and deviations under headers of their own."""
    named: dict[str, Figure] = {}
    for column in columns:
        found = column.read(result, row)
        ends = ["value", *(["low", "high"] if column.interval else []), *(["deviation"] if deviations else [])]
        named |= {f"{column.name}_{end}".removesuffix("_value"): getattr(found, end, None) for end in ends}
    return named


def shown(found: Interval | None, show: Callable[[float], str], bounded: bool) -> Cell:
    """Return a figure as it is shown, with its deviation over seeds, or its bounds, if it has any to show."""
    if found is None:
        return Cell(MISSING, "")
    if found.deviation:
        return Cell(show(found.value), f"{PLUS_MINUS} {show(found.deviation)}")
    bounds = [show(bound) for bound in (found.low, found.high)]
    exact = found.low == found.value == found.high
    if not bounded or exact or bounds == ["nan", "nan"]:
        return Cell(show(found.value), "")
    separator = " to " if found.low < 0 else DASH
    return Cell(show(found.value), f"{bounds[0].removesuffix('%')}{separator}{bounds[1]}")


def same_model(checks: Sequence[Interval]) -> str:
    """Write the measured speed of a copy of the base, with a warning if its interval does not contain 1.

    Args:
        checks: one of each comparison; none where nothing was timed.
    """
    if not checks:
        return ""
    written = [[f"{100 * (each - 1):+.1f}%" for each in (check.value, check.low, check.high)] for check in checks]
    said = "speed of a copy of the base: " + ", ".join(f"{value} [{low}, {high}]" for value, low, high in written)
    if all(check.low <= 1 <= check.high for check in checks):
        return said
    return f"warning: {said}. Equal models should come out equal: time them again on an idle machine"


def summed_up(subject: str, findings: Sequence[str]) -> str:
    """Write a subject and the findings on it, if any, as one sentence."""
    return f"{subject}: {'; '.join(findings)}." if findings else f"{subject}."


def sentence(text: str) -> str:
    """Write a phrase as a sentence that follows another; nothing for nothing."""
    return f" {text[0].upper()}{text[1:]}." if text else ""


def counted(number: int, noun: str) -> str:
    """Write how many there are of something: ``1 block``, ``1,203 blocks``."""
    return f"{number:,} {noun}{'s' * (number != 1)}"
