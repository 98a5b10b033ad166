"""Rows of text files: `.txt`, `.csv`, `.jsonl`, `.parquet`; and the folders of packages that carry such files."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerfold.errors import CorpusError, InputError, MissingExtraError, one_of

SUFFIXES = (".txt", ".csv", ".jsonl", ".parquet")
_ENCODING = "utf-8-sig"
"""UTF-8, with or without a byte order mark."""
_LONGEST_FIELD = 1 << 30
"""Maximum number of characters in a CSV field; the csv module's own limit is below a long document."""


@dataclass(frozen=True)
class Row:
    """One row of a file or data set.

    Attributes:
        where: place of the row, for messages.
        values: one for each requested field.
    """

    where: str
    values: tuple[Any, ...]


def read_rows(path: Path, fields: Sequence[str], lines: bool = False) -> Iterator[Row]:
    """Yield the rows of one file with the values of these fields; a ``.txt`` file has one field, of any name.

    Args:
        lines: whether each line of a ``.txt`` file is a row; by default blank lines separate its rows.

    Raises:
        InputError: a suffix that is none of `SUFFIXES`, or several fields of a ``.txt`` file.
        CorpusError: the file or one of its rows cannot be read, or lacks a field.
        MissingExtraError: the package that reads parquet is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(f"cannot read {str(path)!r}: suffix {one_of(path.suffix, SUFFIXES)}")
    if path.suffix == ".txt" and len(fields) > 1:
        raise InputError(
            f"{str(path)!r} holds text alone, and {' and '.join(fields)} are needed: .csv, .jsonl, .parquet"
        )
    try:
        yield from _read_txt(path, lines) if path.suffix == ".txt" else _READERS[path.suffix](path, fields)
    except UnicodeDecodeError as error:
        raise CorpusError(f"cannot read {str(path)!r}: {error}; accepted: UTF-8 text") from error
    except OSError as error:
        raise CorpusError(f"cannot read {str(path)!r}: {error}") from error


def has_blank_lines(path: Path) -> bool:
    """Whether a ``.txt`` file has a blank line between two lines of text.

    Raises:
        CorpusError: the file cannot be read.
    """
    return len(list(itertools.islice(read_rows(path, ["text"]), 2))) == 2


def _read_txt(path: Path, lines: bool) -> Iterator[Row]:
    paragraph: list[str] = []
    first = 1
    with path.open(encoding=_ENCODING) as file:
        for number, line in enumerate(itertools.chain(file, [""]), start=1):
            if line.strip():
                first = first if paragraph else number
                paragraph.append(line)
            if paragraph and (lines or not line.strip()):
                yield Row(f"{str(path)!r} line {first}", ("".join(paragraph),))
                paragraph = []


def _read_csv(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_FIELD)
    with path.open(encoding=_ENCODING, newline="") as file:
        # Strict: otherwise an unclosed quote silently turns the rest of the file into one cell.
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                where = f"{str(path)!r} line {reader.line_num}"
                if None in row:
                    raise CorpusError(f"{where} has more cells than the header: a cell with a comma needs quotes")
                # A line with too few cells lacks its last fields, like a JSON object without a key.
                yield _row({name: value for name, value in row.items() if value is not None}, fields, where)
        except csv.Error as error:
            raise CorpusError(f"{str(path)!r} line {reader.reader.line_num} is not CSV: {error}") from error


def _read_jsonl(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    with path.open(encoding=_ENCODING) as file:
        lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
        for count, (number, line) in enumerate(lines):
            if count == 0 and line.lstrip().startswith("["):
                raise CorpusError(
                    f"{str(path)!r} is a JSON array; accepted: one JSON object a line, as jq -c '.[]' writes an array"
                )
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise CorpusError(f"{str(path)!r} line {number} is not JSON: {error.msg}") from error
            yield _row(row, fields, f"{str(path)!r} line {number}")


def _read_parquet(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "datasets") from error
    try:
        source = parquet.ParquetFile(path)
        for field in fields:
            if field not in source.schema_arrow.names:
                raise CorpusError(f"{str(path)!r} has no field {one_of(field, source.schema_arrow.names)}")
        rows = (row for batch in source.iter_batches(columns=list(fields)) for row in batch.to_pylist())
        for number, row in enumerate(rows):
            yield _row(row, fields, f"{str(path)!r} row {number}")
    except pyarrow.ArrowException as error:
        raise CorpusError(f"{str(path)!r} is not a readable parquet file: {error}") from error


_READERS: Mapping[str, Callable[[Path, Sequence[str]], Iterator[Row]]] = {
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _row(row: Any, fields: Sequence[str], where: str) -> Row:
    for field in fields:
        if not isinstance(row, dict) or field not in row:
            names = row if isinstance(row, dict) else ()
            raise CorpusError(f"{where} has no field {one_of(field, names)}")
    return Row(where, tuple(row[field] for field in fields))


def package_folder(module: str, package: str, extra: str) -> Path:
    """Return the folder of an installed package, without importing it.

    Raises:
        MissingExtraError: the package is not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(package, extra)
    return Path(next(iter(spec.submodule_search_locations)))


def text_of(row: Row, index: int = 0, field: str = "text") -> str:
    """Return a text value of a row.

    Raises:
        CorpusError: the value is not text, or not valid Unicode.
    """
    text = row.values[index]
    if not isinstance(text, str):
        raise CorpusError(f"{row.where}: field {field!r} is {type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(f"{row.where}: field {field!r} is not valid Unicode: {error.reason}") from error
    return text
