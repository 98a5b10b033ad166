"""The tables of a search in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from layerfold.report import numerals
from layerfold.report.search_columns import best_table, candidate_table, described, footnotes
from layerfold.report.terminal import print_parts
from layerfold.search.found import Found

MOST_TOGETHER = 15


def print_search(found: Found, console: Console) -> None:
    """Print each block alone and the best of the other candidates, and the best of each number removed."""
    candidates = candidate_table(found, MOST_TOGETHER)
    print_parts(candidates, console)
    if below := footnotes(found, candidates):
        _note(console, "; ".join(below))
        console.print()
    print_parts(best_table(found), console)
    notes = ["95% intervals below the values"] if found.tests or found.timings else []
    notes += ["quartiles below ms/token"] if found.timings else []
    if notes:
        _note(console, "; ".join(notes))
    _note(console, f"chosen on {described(found.text)}; tested on {described(found.test_text)}")


def _note(console: Console, text: str) -> None:
    console.print(Text(numerals.printable(text), style="dim"))
