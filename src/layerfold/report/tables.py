"""A table for people, as the terminal and the page show it: the rows of a study, or of a search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from layerfold.maths.intervals import Interval

DASH = "\N{EN DASH}"
TIMES_BASE = "\N{MULTIPLICATION SIGN} base"

PLUS_MINUS = "\N{PLUS-MINUS SIGN}"

MISSING = DASH
"""What stands where nothing was measured."""

Direction = Literal["lower", "higher", ""]


@dataclass(frozen=True)
class Cell:
    """One figure as it is shown: the value, and its interval (empty where the value has none)."""

    value: str
    interval: str


class Heading(Protocol):
    """What stands above a column, and what the page says that it means."""

    @property
    def title(self) -> str:
        """The first line."""

    @property
    def unit(self) -> str:
        """The second line."""

    @property
    def meaning(self) -> str:
        """What the figure is, in a phrase."""

    @property
    def better(self) -> Direction:
        """Which direction is better, where one is."""

    @property
    def group(self) -> str:
        """What columns that stay together have in common."""


@dataclass(frozen=True)
class Table:
    """Columns with their cells, by label.

    Attributes:
        header: what stands above the labels.
        base: the label of the row that the others are compared with.
        columns, rows: what is above, and what is in, the table.
    """

    header: str
    base: str
    columns: Sequence[Heading]
    rows: Sequence[tuple[str, Sequence[Cell]]]


def same_model(checks: Sequence[Interval]) -> str:
    """Say how fast a copy of the base came out to be, with a warning where its interval does not hold 1.

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


def shown(found: Interval | None, show: Callable[[float], str], bounded: bool) -> Cell:
    """Return a figure as it is shown, with its deviation over seeds, or its bounds, if it has any to show."""
    if found is None:
        return Cell(MISSING, "")
    if found.deviation:
        return Cell(show(found.value), f"{PLUS_MINUS} {show(found.deviation)}")
    bounds = [show(bound) for bound in (found.low, found.high)]
    certain = found.low == found.value == found.high
    if not bounded or certain or bounds == ["nan", "nan"]:
        return Cell(show(found.value), "")
    separator = " to " if found.low < 0 else DASH
    return Cell(show(found.value), f"{bounds[0].removesuffix('%')}{separator}{bounds[1]}")
