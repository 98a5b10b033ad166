"""A report in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from layerfold.report.numerals import printable
from layerfold.report.report import Cell, Column, Line, Report, Samples, Table

GAP = 2
STYLES = {"": "", "note": "dim", "warning": "", "heading": "bold"}

Shown = tuple[Column, Sequence[Cell]]
"""A column with its cells, row by row."""


def print_report(report: Report, console: Console) -> None:
    """Print a report's tables, each figure above its interval, and what is said of them."""
    for part in report.printed:
        if isinstance(part, Table):
            _print_table(part, console)
        elif isinstance(part, Samples):
            _print_samples(part, console)
        else:
            console.print(_line(part))


def _line(line: Line) -> Text:
    title = Text.assemble((line.title, "bold"), ": " if line.title else "", style=STYLES[line.style])
    return title.append(printable(line.text))


def _print_samples(samples: Samples, console: Console) -> None:
    for prompt, entries in samples.prompts:
        console.print(Text(printable(prompt), style="bold"))
        grid = Grid(box=None, padding=(0, GAP, 0, 0), show_header=False)
        grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True)
        grid.add_column(justify="right", no_wrap=True)
        grid.add_column(overflow="fold")
        for sample in entries:
            text = printable(" ".join(sample.text.split()))
            beside = (Text(each, style="dim") for each in (sample.choice, sample.repeated))
            grid.add_row(Text(printable(sample.label)), *beside, Text(text))
        console.print(grid)
        console.print()


def _print_table(table: Table, console: Console) -> None:
    """Print a table.

    Figures are never cut: columns that do not fit the console's width follow in a table of their own, those of one
    group staying together.
    """
    # Text as wide as the console would leave no room for a figure; longer labels continue on the next line.
    longest = max(cell_len(printable(label)) for label in (table.header, *(label for label, _ in table.rows)))
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
        grid.add_row(Text(printable(label), style=style), *figures)
    return grid


def _figure(cell: Cell, style: str) -> Text:
    return Text.assemble((cell.value, style), *([("\n" + cell.interval, "dim")] if cell.interval else []))


def _width(shown: Shown) -> int:
    column, cells = shown
    texts = [*_header(column).split("\n"), *(text for cell in cells for text in (cell.value, cell.interval))]
    return max(cell_len(text) for text in texts)


def _header(column: Column) -> str:
    return f"{printable(column.title)}\n{printable(column.unit)}"
