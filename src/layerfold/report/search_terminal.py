"""The tables of a search in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from layerfold.report import numerals
from layerfold.report.search import best_table, candidate_table, described, footnotes, timing_check
from layerfold.report.tables import Table
from layerfold.report.terminal import print_parts
from layerfold.report.window_columns import best_windows_table, sharing, windows_table
from layerfold.search import Found, FoundWindows
from layerfold.search.results import Searched

MOST_TOGETHER = 15
MOST_WINDOWS = 100


def print_search(found: Found, console: Console) -> None:
    """Print each block alone and the best of the other candidates, and the best of each number removed."""
    quartiles = ["quartiles below ms/token"] if found.timings else []
    intervals = ["95% intervals below the values"] if found.tests or found.timings else []
    checks = list(filter(None, [timing_check(found.timings.get(0))]))
    _print(found, candidate_table(found, MOST_TOGETHER), best_table(found), [*intervals, *quartiles, *checks], console)


def print_windows(found: FoundWindows, console: Console) -> None:
    """Print the windows that were measured, and the best of each size."""
    intervals = ["95% intervals below the values"] if found.tests else []
    _print(found, windows_table(found, MOST_WINDOWS), best_windows_table(found), intervals, console)
    note(console, f"shared with {sharing(found)}")


def _print(found: Searched[Any], candidates: Table, best: Table, notes: Sequence[str], console: Console) -> None:
    print_parts(candidates, console)
    if below := footnotes(found, candidates):
        note(console, "; ".join(below))
        console.print()
    print_parts(best, console)
    if notes:
        note(console, "; ".join(notes))
    note_texts(console, found.text, found.test_text)


def note_texts(console: Console, text: Mapping[str, Any], test_text: Mapping[str, Any]) -> None:
    """Print which text was selected on, and which was tested on."""
    note(console, f"chosen on {described(text)}; tested on {described(test_text)}")


def note(console: Console, text: str) -> None:
    """Print a line that stands back."""
    console.print(Text(numerals.printable(text), style="dim"))
