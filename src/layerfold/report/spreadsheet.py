"""The rows of a report as a CSV file."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from layerfold.files import write_text
from layerfold.report.report import Report


def write_csv(report: Report, path: Path) -> None:
    """Write one row a variant or candidate: every figure unrounded, bounds in columns of their own.

    What has not been measured is empty; ``nan`` and ``inf`` are written so, ``true`` and ``false`` in small letters.
    Labels are quoted, and otherwise written as they are: a spreadsheet may take one that begins with ``=`` for a
    formula.

    Raises:
        OutputError: the file cannot be written.
    """
    buffer = io.StringIO()
    header = list(dict.fromkeys(name for row in report.rows for name in row))
    writer = csv.DictWriter(buffer, header, lineterminator="\n")
    writer.writeheader()
    for row in report.rows:
        flags = {name: str(value).lower() for name, value in row.items() if isinstance(value, bool)}
        writer.writerow({**row, **flags})
    write_text(path, buffer.getvalue())
