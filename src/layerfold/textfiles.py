"""Files of text -> documents: `.txt`, `.jsonl`, `.parquet`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from layerfold.errors import CorpusError, InputError, MissingExtraError, one_of

SUFFIXES = (".txt", ".jsonl", ".parquet")


def read_file(path: Path, field: str) -> Iterator[str]:
    """Yield the documents of one file, `field` being where a row holds its text.

    Raises:
        InputError: a suffix that is none of `SUFFIXES`.
        CorpusError: the file, or a row of it, cannot be read.
        MissingExtraError: parquet without the package that reads it.
    """
    if path.suffix not in _READERS:
        raise InputError(f"cannot read {str(path)!r}: suffix {one_of(path.suffix, SUFFIXES)}")
    try:
        yield from _READERS[path.suffix](path, field)
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"cannot read {str(path)!r}: {error}") from error


def _read_txt(path: Path, field: str) -> Iterator[str]:
    paragraph: list[str] = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                paragraph.append(line)
            elif paragraph:
                yield "".join(paragraph)
                paragraph = []
    if paragraph:
        yield "".join(paragraph)


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise CorpusError(f"{str(path)!r} line {number} is not JSON: {error.msg}") from error
            yield text_of(row, field, f"{str(path)!r} line {number}")


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "datasets") from error
    try:
        source = parquet.ParquetFile(path)
        if field not in source.schema_arrow.names:
            raise CorpusError(f"{str(path)!r} has no field {one_of(field, source.schema_arrow.names)}")
        texts = (text for batch in source.iter_batches(columns=[field]) for text in batch.column(0).to_pylist())
        for row, text in enumerate(texts):
            yield text_of({field: text}, field, f"{str(path)!r} row {row}")
    except pyarrow.ArrowException as error:
        raise CorpusError(f"{str(path)!r} is not a readable parquet file: {error}") from error


_READERS: Mapping[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def text_of(row: Any, field: str, where: str) -> str:
    """Return a row's text; `where` names the row in what is raised where there is none."""
    if not isinstance(row, dict) or field not in row:
        names = row if isinstance(row, dict) else ()
        raise CorpusError(f"{where} has no field {one_of(field, names)}")
    if not isinstance(row[field], str):
        raise CorpusError(f"{where}: field {field!r} is {type(row[field]).__name__}, not text")
    text: str = row[field]
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(f"{where}: field {field!r} is not valid Unicode: {error.reason}") from error
    return text
