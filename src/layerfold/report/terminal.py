"""The table in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from layerfold.records import Results
from layerfold.report import numerals
from layerfold.report.published import Comparison
from layerfold.report.samples import samples_of
from layerfold.report.study import ZEROS, columns, over_seeds, shows_zeros, table, timing_check
from layerfold.report.tables import PLUS_MINUS, Cell, Heading, Table

GAP = 2

Shown = tuple[Heading, Sequence[Cell]]
"""A column with its cells, row by row."""


def print_table(results: Results, console: Console) -> None:
    """Print one row a variant, each figure above its interval."""
    print_parts(table(results), console)
    printed = [column for column in columns(results) if not column.detail]
    notes = ["95% intervals below the values"] if any(column.interval for column in printed) else []
    notes += [f"{PLUS_MINUS} the standard deviation over seeds"] if over_seeds(results) else []
    notes += ["quartiles below ms/token"] if any(column.name == "latency_ms" for column in printed) else []
    notes += [timing_check(results)] if timing_check(results) else []
    notes += [ZEROS] if shows_zeros(results) else []
    if notes:
        console.print(Text("; ".join(notes)), style="dim")


def print_samples(results: Results, console: Console) -> None:
    """Print what every variant wrote after each prompt."""
    for prompt, samples in samples_of(results):
        console.print(Text(numerals.printable(prompt), style="bold"))
        grid = Grid(box=None, padding=(0, GAP, 0, 0), show_header=False)
        grid.add_column(no_wrap=True)
        grid.add_column(justify="right", no_wrap=True)
        grid.add_column(overflow="fold")
        for sample in samples:
            text = numerals.printable(" ".join(sample.text.split()))
            grid.add_row(Text(numerals.printable(sample.label)), Text(sample.repeated, style="dim"), Text(text))
        console.print(grid)
        console.print()
    console.print("beside each text the share of its 4-grams that occurred before in it", style="dim")


def print_published(comparisons: Sequence[Comparison], console: Console) -> None:
    """Print a study beside the published ones, and what their figures differ in."""
    for comparison in comparisons:
        console.print(Text(f"Beside the published figures of {comparison.model}", style="bold"))
        if comparison.caveat:
            console.print(Text(numerals.printable(comparison.caveat)))
        console.print()
        print_parts(comparison.table, console)
        for title, note in comparison.notes:
            console.print(Text.assemble((title, "bold"), numerals.printable(f": {note}"), style="dim"))
        console.print()


def print_parts(table: Table, console: Console) -> None:
    """Print a table, each figure above its interval.

    Figures are never cut: columns that do not fit the console's width follow in a table of their own, those of one
    group staying together.
    """
    # Text as wide as the console would leave no room for a figure; longer labels continue on the next line.
    longest = max(cell_len(numerals.printable(label)) for label in (table.header, *(label for label, _ in table.rows)))
    label_width = min(longest, console.width // 3)
    for part in _parts(table, console.width - label_width):
        console.print(_grid(table, part, label_width))
        console.print()


def _parts(table: Table, room: int) -> Iterator[list[Shown]]:
    part: list[Shown] = []
    left = room
    shown = [(column, [cells[index] for _, cells in table.rows]) for index, column in enumerate(table.columns)]
    for _, group in groupby(shown, key=lambda each: each[0].group):
        together = [(each, GAP + _width(each)) for each in group]
        fits = sum(width for _, width in together) <= room
        for bundle in [together] if fits else [[each] for each in together]:
            needed = sum(width for _, width in bundle)
            if part and needed > left:
                yield part
                part, left = [], room
            part += [each for each, _ in bundle]
            left -= needed
    yield part


def _grid(table: Table, part: Sequence[Shown], label_width: int) -> Grid:
    # The box's divider, a blank, is the other half of the gap.
    grid = Grid(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
    grid.add_column(table.header, min_width=label_width, max_width=label_width, overflow="fold", vertical="top")
    for column, _ in part:
        grid.add_column(Text(_header(column)), justify="right", overflow="fold")
    for index, (label, _) in enumerate(table.rows):
        style = "bold" if label == table.base else ""
        figures = [_figure(cells[index], style) for _, cells in part]
        grid.add_row(Text(numerals.printable(label), style=style), *figures)
    return grid


def _figure(cell: Cell, style: str) -> Text:
    return Text.assemble((cell.value, style), *([("\n" + cell.interval, "dim")] if cell.interval else []))


def _width(shown: Shown) -> int:
    column, cells = shown
    texts = [*_header(column).split("\n"), *(text for cell in cells for text in (cell.value, cell.interval))]
    return max(cell_len(text) for text in texts)


def _header(column: Heading) -> str:
    return f"{numerals.printable(column.title)}\n{numerals.printable(column.unit)}"
