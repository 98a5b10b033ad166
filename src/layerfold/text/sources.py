"""Named sources of rows (a file, a folder of files, a data set on the Hub), and their disjoint splits."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from layerfold.environment import hub_reachable
from layerfold.errors import (
    CorpusError,
    InputError,
    LayerfoldError,
    MissingExtraError,
    OfflineError,
    first_line,
    one_of,
)
from layerfold.text.files import SUFFIXES, Row, has_blank_lines, read_rows

Split = Literal["train", "calibration", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
_HELD_OUT: tuple[Split, ...] = ("test", "validation")
_CALIBRATION_EVERY = 20
IMDB = "imdb"
"""Name of the corpus in an installed package."""
ALL = "all"
"""Split name of all rows of a source, or of the rows of a source without splits."""
_Bounds = Mapping[Split, float]
"""Upper bound of each split's hashes, as numbers from 0 to 1."""
_OF_ALL: _Bounds = {"test": 0.1, "validation": 0.2, "calibration": 0.24, "train": 1.0}
_OF_TRAIN: _Bounds = {"calibration": 1 / _CALIBRATION_EVERY, "train": 1.0}
_ALIASES = {
    "wikitext": "Salesforce/wikitext",
    "cnn_dailymail": "abisee/cnn_dailymail",
    "ag_news": "fancyzhx/ag_news",
}

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """Rows of a source by its own splits: ``train``, ``validation`` and ``test``, any of which may be absent.

    Attributes:
        name: the data set's full id, or the path.
        fields: names of the rows' values, in order.
        splits: rows by split, read during the iteration, once. A source without splits has `ALL` alone.
        local: whether the source is a file or a folder.
        lines: whether the rows are the lines of a text without blank lines.
    """

    name: str
    fields: tuple[str, ...]
    splits: Mapping[str, Iterable[Row]]
    local: bool = False
    lines: bool = False


def read_source(name: str, fields: Sequence[str], known: Sequence[str] = ()) -> Source:
    """Open a path or a data set on the Hub.

    Args:
        name: a path, or ``owner/name`` or ``owner/name/config`` on the Hub; ``:field``, or ``:field,field``, behind
            it names the columns in place of `fields`.
        known: other names that the caller accepts, for the message.

    Raises:
        InputError: an unknown name, or another number of fields.
        CorpusError: the source is missing or unreadable.
        MissingExtraError: the package that reads it is not installed.
        OfflineError: a data set that is neither cached nor reachable.
    """
    if not name.strip():
        raise InputError(f"an empty name of a text; accepted: {', '.join([*known, 'a path', 'a Hub id owner/name'])}")
    location, given = _parted(name)
    named = tuple(field.strip() for field in given.split(",")) if given else tuple(fields)
    if len(named) != len(fields) or not all(named):
        raise InputError(f"{name!r} names the fields {given!r}; accepted: {len(fields)}, for {' and '.join(fields)}")
    path = Path(location)
    if path.is_file():
        lines = path.suffix == ".txt" and not has_blank_lines(path)
        return Source(str(path), named, {ALL: read_rows(path, named, lines)}, local=True, lines=lines)
    if path.exists():
        return Source(str(path), named, _folder(path, named), local=True)
    if path.suffix in SUFFIXES or path.is_absolute() or location.startswith((".", "~")) or location.endswith("/"):
        raise CorpusError(f"no file or folder at {location!r}")
    if "/" in location or location in _ALIASES:
        return _hub(location, named)
    raise InputError(f"unknown corpus {one_of(name, [*known, *_ALIASES, 'a path', 'a Hub id owner/name'])}")


def split_by_row(rows: Iterable[T]) -> dict[str, list[T]]:
    """Split rows as pocket's text was: row % 10 == 0 is test, 1 validation, the others train."""
    split: dict[str, list[T]] = {"train": [], "validation": [], "test": []}
    for number, row in enumerate(rows):
        split[{0: "test", 1: "validation"}.get(number % 10, "train")].append(row)
    return split


def unsplit(name: str) -> bool:
    """Whether a source has no splits: a file, or a folder whose files are not named by split.

    Raises:
        InputError: a name that no file can have.
        CorpusError: a folder without text files.
    """
    if name == IMDB:  # the installed package, even beside a file of that name
        return False
    path = Path(_parted(name)[0])
    return path.is_file() or (path.is_dir() and not any(_named(_files(path)).values()))


def _parted(name: str) -> tuple[str, str]:
    """Split a name into its path or data set id, and the fields behind it; a path may contain colons too."""
    location, _, fields = name.rpartition(":")
    try:
        whole = not location or Path(name).exists() or Path(name).suffix in SUFFIXES
    except OSError as error:
        raise InputError(f"corpus {name[:60]!r}: {error.strerror}") from error
    return (name, "") if whole else (location, fields)


def _folder(path: Path, fields: tuple[str, ...]) -> Mapping[str, Iterable[Row]]:
    files = _files(path)
    named = _named(files)
    if not any(named.values()):
        return {ALL: (row for file in files for row in read_rows(file, fields))}
    strays = [file for file in files if not any(file in group for group in named.values())]
    if strays:
        accepted = ", ".join(f"{split}*" for split in named)
        raise CorpusError(f"{str(strays[0])!r} lies beside files of named splits; accepted: {accepted}")
    return {split: [row for file in group for row in read_rows(file, fields)] for split, group in named.items()}


def _files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    if not files:
        raise CorpusError(f"the folder {str(folder)!r} holds no {', '.join(SUFFIXES)} file")
    return files


def _named(files: Iterable[Path]) -> dict[str, list[Path]]:
    """Files by the split that their names begin with."""
    splits = ("train", "validation", "test")
    return {split: [file for file in files if re.match(rf"{split}(?![a-z])", file.stem)] for split in splits}


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
    with loading(f"data set {location!r}", CorpusError):
        loaded = datasets.load_dataset(name, config)
    for table in loaded.values():
        for field in fields:
            if field not in table.column_names:
                raise CorpusError(f"data set {location!r} has no field {one_of(field, table.column_names)}")
    known = {split: table for split, table in loaded.items() if split in ("train", *_HELD_OUT)}
    return Source(name, fields, {split: _rows(table, fields, location, split) for split, table in known.items()})


@contextlib.contextmanager
def loading(name: str, kind: type[LayerfoldError]) -> Iterator[None]:
    """Load data with ``datasets``, from its cache alone while the Hub cannot be reached.

    Args:
        name: noun and name of the data, for messages.
        kind: error for data that cannot be loaded: the library raises many kinds, all due to the user's input.

    Raises:
        OfflineError: the data are not cached.
    """
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or not hub_reachable()
    try:
        yield
    except ConnectionError as error:
        raise OfflineError(f"the Hub cannot be reached and {name} is not in the local cache") from error
    except Exception as error:
        raise kind(f"{name} cannot be loaded: {first_line(error)}") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _rows(table: Any, fields: tuple[str, ...], location: str, split: str) -> Iterator[Row]:
    for number, row in enumerate(table.select_columns(list(fields))):
        yield Row(f"{location!r} {split} row {number}", tuple(row[field] for field in fields))


def disjoint(
    source: Mapping[str, Iterable[T]], text: Callable[[T], str], by_hash: bool = False
) -> tuple[dict[str, list[T]], dict[str, int]]:
    """Drop duplicates within and between splits, and take the calibration items out of train.

    A text in test is dropped from validation, and a text in either from train. Two texts are duplicates when they
    differ at most in white space; empty texts are dropped. Items of `ALL` are split by the hash of their texts.

    Args:
        by_hash: whether hashes choose the calibration items too, instead of every twentieth item of train.

    Returns:
        Items by split, with all of them under `ALL`; and the number of dropped items by split.
    """
    seen: set[str] = set()
    dropped: dict[str, list[str]] = {split: [] for split in (*SPLITS, ALL)}

    def new(split: str) -> Iterator[T]:
        for item in source.get(split, ()):
            key = same(text(item))
            if key and key not in seen:
                seen.add(key)
                yield item
            else:
                dropped[split].append(key)

    if ALL in source:
        rows = list(new(ALL))
        kept = _by_hash(rows, text, _OF_ALL)
        place = {same(text(item)): split for split in SPLITS for item in kept[split]}
        for key in dropped[ALL]:
            dropped[place.get(key, "train")].append(key)
        return kept | {ALL: rows}, {split: len(keys) for split, keys in dropped.items()}
    kept = {split: list(new(split)) for split in (*_HELD_OUT, "train")}
    rest = kept["train"]
    if by_hash:
        kept |= _by_hash(rest, text, _OF_TRAIN)
    else:
        kept["calibration"] = rest[::_CALIBRATION_EVERY]
        kept["train"] = [item for number, item in enumerate(rest) if number % _CALIBRATION_EVERY]
    dropped[ALL] = [key for keys in dropped.values() for key in keys]
    every = [*kept["test"], *kept["validation"], *rest]
    return kept | {ALL: every}, {split: len(keys) for split, keys in dropped.items()}


def _by_hash(items: Sequence[T], text: Callable[[T], str], bounds: _Bounds) -> dict[str, list[T]]:
    """Split items by the hashes of their texts, whatever their order and the other items.

    An empty split gets the item whose hash is nearest. Fewer items than splits are not split: all of them are train
    and calibration, and none is held out.
    """
    if len(items) < len(bounds):
        return {split: list(items) if split in ("train", "calibration") else [] for split in bounds}
    starts = dict(zip(bounds, (0.0, *bounds.values()), strict=False))
    places = [_place(text(item)) for item in items]
    chosen = [next(split for split, end in bounds.items() if place < end) for place in places]
    for empty in [split for split in bounds if split not in chosen]:
        donor = max(bounds, key=chosen.count)
        nearest = min((abs(places[i] - starts[empty]), i) for i, split in enumerate(chosen) if split == donor)
        chosen[nearest[1]] = empty
    return {split: [item for item, its in zip(items, chosen, strict=True) if its == split] for split in bounds}


def _place(text: str) -> float:
    """Hash of a text as a number from 0 to 1."""
    digest = hashlib.sha256(same(text).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def same(document: str) -> str:
    """Return a text with every run of white space as one space; duplicates share it."""
    return " ".join(document.split())
