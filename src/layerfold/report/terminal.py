"""The table in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from layerfold.records import BASE_LABEL, Results
from layerfold.report import numerals
from layerfold.report.columns import Column, columns

GAP = 2
HEADER = "variant"


def print_table(results: Results, console: Console) -> None:
    """Print one row a variant, each figure above its interval.

    Figures are never cut: columns that do not fit the console's width follow in a table of their own, those of one
    evaluator staying together.
    """
    shown = [column for column in columns(results) if not column.detail]
    # Text as wide as the console would leave no room for a figure; longer labels continue on the next line.
    longest = max(cell_len(numerals.printable(label)) for label in (HEADER, *results.labels))
    label_width = min(longest, console.width // 3)
    for part in _parts(results, shown, console.width - label_width):
        console.print(_table(results, part, label_width))
        console.print()
    notes = ["95% intervals below the values"] if any(column.interval for column in shown) else []
    notes += ["quartiles below ms/token"] if any(column.name == "latency_ms" for column in shown) else []
    if notes:
        console.print("; ".join(notes), style="dim")


def _parts(results: Results, shown: Sequence[Column], room: int) -> Iterator[list[Column]]:
    part: list[Column] = []
    left = room
    for _, group in groupby(shown, key=lambda column: column.group):
        together = [(column, GAP + _width(results, column)) for column in group]
        fits = sum(width for _, width in together) <= room
        for bundle in [together] if fits else [[column] for column in together]:
            needed = sum(width for _, width in bundle)
            if part and needed > left:
                yield part
                part, left = [], room
            part += [column for column, _ in bundle]
            left -= needed
    yield part


def _table(results: Results, part: Sequence[Column], label_width: int) -> Table:
    # The box's divider, a blank, is the other half of the gap.
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
    table.add_column(HEADER, min_width=label_width, max_width=label_width, overflow="fold", vertical="top")
    for column in part:
        table.add_column(Text(_header(column)), justify="right", overflow="fold")
    for label in results.labels:
        style = "bold" if label == BASE_LABEL else ""
        cells = [column.cell(results, label) for column in part]
        figures = [Text.assemble((cell.value, style), "\n", (cell.interval, "dim")) for cell in cells]
        table.add_row(Text(numerals.printable(label), style=style), *figures)
    return table


def _width(results: Results, column: Column) -> int:
    cells = [column.cell(results, label) for label in results.labels]
    texts = [*_header(column).split("\n"), *(text for cell in cells for text in (cell.value, cell.interval))]
    return max(cell_len(text) for text in texts)


def _header(column: Column) -> str:
    return f"{numerals.printable(column.title)}\n{numerals.printable(column.unit)}"
