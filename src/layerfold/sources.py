"""Named sources of rows: a file, a folder of files, a data set on the Hub; and what keeps their splits apart."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from layerfold.errors import CorpusError, InputError, MissingExtraError, OfflineError, first_line, one_of
from layerfold.network import hub_reachable
from layerfold.textfiles import SUFFIXES, Row, read_rows

Split = Literal["train", "calibration", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
_HELD_OUT: tuple[Split, ...] = ("test", "validation")
_CALIBRATION_EVERY = 20
_ALIASES = {
    "wikitext": "Salesforce/wikitext",
    "cnn_dailymail": "abisee/cnn_dailymail",
    "ag_news": "fancyzhx/ag_news",
}

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """Rows of each of a source's own splits: ``train``, ``validation`` and ``test``, any of which may be absent.

    Attributes:
        name: the data set's full id, or the path.
        fields: what the rows hold, in order.
        splits: rows by split, each read when it is gone through, once.
    """

    name: str
    fields: tuple[str, ...]
    splits: Mapping[str, Iterable[Row]]


def read_source(name: str, fields: Sequence[str], known: Sequence[str] = ()) -> Source:
    """Find a path or a data set on the Hub, and what of its rows is wanted.

    Args:
        name: a path, or ``owner/name`` or ``owner/name/config`` on the Hub; ``:field``, or ``:field,field``, behind
            it names the columns in place of `fields`.
        known: other names that the caller accepts, for the message.

    Raises:
        InputError: a name that is none of these, or another number of fields.
        CorpusError: the source is missing or unreadable.
        MissingExtraError: the package that reads it is not installed.
        OfflineError: a data set that is neither cached nor reachable.
    """
    if not name.strip():
        raise InputError(f"an empty name of a text; accepted: {', '.join([*known, 'a path', 'a Hub id owner/name'])}")
    try:
        location, _, given = name.partition(":") if not Path(name).exists() else (name, "", "")
    except OSError as error:
        raise InputError(f"corpus {name[:60]!r}: {error.strerror}") from error
    named = tuple(field.strip() for field in given.split(",")) if given else tuple(fields)
    if len(named) != len(fields) or not all(named):
        raise InputError(f"{name!r} names the fields {given!r}; accepted: {len(fields)}, for {' and '.join(fields)}")
    path = Path(location)
    if path.exists():
        return Source(str(path), named, _local(path, named))
    if path.suffix in SUFFIXES or path.is_absolute() or location.startswith((".", "~")):
        raise CorpusError(f"no file or folder at {location!r}")
    if "/" in location or location in _ALIASES:
        return _hub(location, named)
    raise InputError(f"unknown corpus {one_of(name, [*known, *_ALIASES, 'a path', 'a Hub id owner/name'])}")


def split_by_row(rows: Iterable[T]) -> dict[str, list[T]]:
    """Split one list as pocket's text: row % 10 == 0 is test, 1 validation, the others train."""
    split: dict[str, list[T]] = {"train": [], "validation": [], "test": []}
    for number, row in enumerate(rows):
        split[{0: "test", 1: "validation"}.get(number % 10, "train")].append(row)
    return split


def _local(path: Path, fields: tuple[str, ...]) -> Mapping[str, Iterable[Row]]:
    if path.is_file():
        return split_by_row(read_rows(path, fields))
    files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    if not files:
        raise CorpusError(f"the folder {str(path)!r} holds no {', '.join(SUFFIXES)} file")
    named = {split: [f for f in files if re.match(rf"{split}(?![a-z])", f.stem)] for split in ("train", *_HELD_OUT)}
    if any(named.values()):
        strays = [f for f in files if not any(f in group for group in named.values())]
        if strays:
            raise CorpusError(
                f"{str(strays[0])!r} lies beside files of named splits; accepted: names that begin with one"
            )
        return {split: [row for f in group for row in read_rows(f, fields)] for split, group in named.items()}
    return split_by_row(row for file in files for row in read_rows(file, fields))


def _hub(location: str, fields: tuple[str, ...]) -> Source:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "datasets") from error
    first, *rest = location.split("/")
    if first in _ALIASES:
        name, config = _ALIASES[first], "/".join(rest) or None
    else:
        name, config = "/".join([first, *rest[:1]]), "/".join(rest[1:]) or None
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or not hub_reachable()
    try:
        loaded = datasets.load_dataset(name, config)
    except ConnectionError as error:
        raise OfflineError(f"the Hub cannot be reached and data set {location!r} is not in the local cache") from error
    except Exception as error:  # the library raises many kinds; each is the user's input, said in one line
        line = first_line(error)
        raise CorpusError(f"data set {location!r} cannot be loaded: {line}") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before
    for table in loaded.values():
        for field in fields:
            if field not in table.column_names:
                raise CorpusError(f"data set {location!r} has no field {one_of(field, table.column_names)}")
    return Source(name, fields, {split: _rows(table, fields, location, split) for split, table in loaded.items()})


def _rows(table: Any, fields: tuple[str, ...], location: str, split: str) -> Iterator[Row]:
    for number, row in enumerate(table.select_columns(list(fields))):
        yield Row(f"{location!r} {split} row {number}", tuple(row[field] for field in fields))


def disjoint(source: Mapping[str, Iterable[T]], text: Callable[[T], str]) -> tuple[dict[str, list[T]], dict[str, int]]:
    """Drop duplicates within and between splits and set the calibration items apart.

    A text that stands in test is dropped from validation, and one that stands in either from train. Two texts are
    duplicates when they agree but for white space; empty ones are dropped.

    Returns:
        Items by split, and how many were dropped from each.
    """
    seen: set[str] = set()
    kept: dict[str, list[T]] = {}
    dropped: dict[str, int] = {}
    for split in (*_HELD_OUT, "train"):
        kept[split] = []
        total = 0
        for item in source.get(split, []):
            total += 1
            key = same(text(item))
            if key and key not in seen:
                seen.add(key)
                kept[split].append(item)
        dropped[split] = total - len(kept[split])
    rest = kept["train"]
    kept["calibration"] = rest[::_CALIBRATION_EVERY]
    kept["train"] = [item for number, item in enumerate(rest) if number % _CALIBRATION_EVERY]
    dropped["calibration"] = 0
    return kept, dropped


def same(document: str) -> str:
    """What two duplicates agree in: the text but for white space."""
    return " ".join(document.split())
