"""The candidates of a search as a CSV file and as a parquet file: one table in two forms."""

from __future__ import annotations

import csv
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerfold.errors import MissingExtraError
from layerfold.files import replacing, write_text
from layerfold.maths.intervals import Interval
from layerfold.report.search import removed
from layerfold.report.window_columns import name
from layerfold.search import Candidate, Found, FoundWindows, Window
from layerfold.search.results import Figures, Searched

Row = dict[str, str | float | None]

# In parquet; other columns are of doubles.
TYPES = {"removed": "string", "blocks": "int64", "parameters": "int64", "best": "bool"}


def write_search_csv(found: Found, path: Path) -> None:
    """Write one row a candidate, the base first: unrounded, and empty where nothing was measured.

    Raises:
        OutputError: the file cannot be written.
    """
    write_rows(_rows(found), path)


def write_windows_csv(found: FoundWindows, path: Path) -> None:
    """Write one row a window, the base first: unrounded, and empty where nothing was measured.

    Raises:
        OutputError: the file cannot be written.
    """
    write_rows([_window_row(found, window) for window in (found.base, *found.candidates)], path)


def check_parquet() -> None:
    """Raise MissingExtraError where `write_search_parquet` would: call it before long work."""
    if importlib.util.find_spec("pyarrow") is None:
        raise MissingExtraError("pyarrow", "datasets")


def write_search_parquet(found: Found, path: Path) -> None:
    """Write the same table as parquet, with null where nothing was measured.

    Raises:
        MissingExtraError: pyarrow is not installed.
        OutputError: the file cannot be written.
    """
    check_parquet()
    import pyarrow
    from pyarrow import parquet

    rows = _rows(found)
    schema = pyarrow.schema([(name, TYPES.get(name, "double")) for name in rows[0]])
    with replacing(path) as temporary:
        parquet.write_table(pyarrow.Table.from_pylist(rows, schema), temporary)


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write rows that have the same columns: ``true`` and ``false`` in small letters, None as nothing.

    Raises:
        OutputError: the file cannot be written.
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        flags = {name: str(value).lower() for name, value in row.items() if isinstance(value, bool)}
        writer.writerow(row | flags)
    write_text(path, buffer.getvalue())


def _rows(found: Found) -> list[Row]:
    return [_row(found, candidate) for candidate in (found.base, *found.candidates)]


def _row(found: Found, candidate: Candidate) -> Row:
    timing = found.timings.get(len(candidate.removed))
    return {
        "removed": removed(candidate),
        "blocks": candidate.blocks,
        **_figures(candidate),
        "milliseconds": None if timing is None else timing.milliseconds.value,
        **_changes(found, candidate),
        "speed_change_percent": found.speed_change_percent(candidate),
        **_chosen(found, candidate),
    }


def _window_row(found: FoundWindows, window: Window) -> Row:
    return {
        "window": name(window),
        "start": window.blocks[0] if window.blocks else None,
        "k": len(window.blocks) or None,
        **_figures(window),
        **_changes(found, window),
        **_chosen(found, window),
    }


def _figures(candidate: Figures) -> Row:
    return {"perplexity": candidate.perplexity, "kl": candidate.kl, "parameters": candidate.parameters}


def _changes(found: Searched[Any], candidate: Figures) -> Row:
    return {
        "parameters_change_percent": found.parameters_change_percent(candidate),
        "perplexity_change_percent": found.perplexity_change_percent(candidate),
    }


def _chosen(found: Searched[Any], candidate: Figures) -> Row:
    """Say whether it is the best of its size, and what it scores on the test text."""
    test = found.test(candidate)
    return {
        "best": candidate.changed == found.best.get(len(candidate.changed), found.base).changed,
        **bounds_of("test_perplexity", None if test is None else test.perplexity),
        **bounds_of("test_versus_base", None if test is None else test.versus_base),
    }


def bounds_of(name: str, interval: Interval | None) -> Row:
    """Return an estimate and its bounds, each in a column of its own; None where nothing was measured."""
    figures = (None, None, None) if interval is None else (interval.value, interval.low, interval.high)
    return dict(zip((name, f"{name}_low", f"{name}_high"), figures, strict=True))
