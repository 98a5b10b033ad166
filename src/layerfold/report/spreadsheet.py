"""The table as a CSV file."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from layerfold.files import write_text
from layerfold.records import Results
from layerfold.report.study import columns, over_seeds


def write_csv(results: Results, path: Path) -> None:
    """Write one row a variant: its label, then every figure unrounded, bounds in columns of their own.

    Where figures are means over seeds, their deviations have columns too.

    What has not been measured is empty; ``nan`` and ``inf`` are written so. Labels are quoted, and otherwise written
    as they are: a spreadsheet may take one that begins with ``=`` for a formula.

    Raises:
        OutputError: the file cannot be written.
    """
    shown = columns(results)
    header = ["label"]
    seeds = over_seeds(results)
    for column in shown:
        header += [column.name, f"{column.name}_low", f"{column.name}_high"] if column.interval else [column.name]
        header += [f"{column.name}_deviation"] if seeds else []
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    for label in results.labels:
        row: list[str | float | None] = [label]
        for column in shown:
            found = column.read(results, label)
            figures = (found.value, found.low, found.high) if found else (None, None, None)
            row += figures if column.interval else figures[:1]
            row += [found.deviation if found else None] if seeds else []
        writer.writerow(row)
    write_text(path, buffer.getvalue())
