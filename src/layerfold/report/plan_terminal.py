"""The tables of a plan in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from layerfold.planning import Planned
from layerfold.report.plan import asked, front_table, outcome, winner_table
from layerfold.report.search import timing_check
from layerfold.report.search_terminal import note, note_texts
from layerfold.report.terminal import print_parts


def print_plan(planned: Planned, console: Console) -> None:
    """Print the front, what was built, and whether the budget is met."""
    print_parts(front_table(planned), console)
    print_parts(winner_table(planned), console)
    quartiles = "" if planned.winner.latency is None else "; quartiles below ms/token"
    note(console, f"95% intervals below the values{quartiles}")
    if check := timing_check(planned.base_latency):
        note(console, check)
    console.print(Text(f"budget: {asked(planned.budget)}: {outcome(planned)}"))
    note_texts(console, planned.text, planned.test_text)
