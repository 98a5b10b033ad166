"""Texts that a model is made with: windows from the first long enough, and their record in its provenance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layerfold.checkpoint.provenance import Provenance
from layerfold.errors import CorpusError
from layerfold.text.corpora import Corpus, Splits
from layerfold.text.sources import ALL
from layerfold.text.windows import TokenWindows, cut_windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Note = Callable[[str], None]


def cut_enough(
    texts: Sequence[Corpus], tokenizer: PreTrainedTokenizerBase, context: int, tokens: int, seed: int, note: Note
) -> TokenWindows:
    """Cut the first text with enough tokens, or the last, with its documents in a seeded order.

    Args:
        note: receives a line that names the text and its tokens.

    Raises:
        CorpusError: the last text is shorter than one window.
    """
    for text in texts:
        try:
            windows = cut_windows(text, tokenizer, context=context, limit_tokens=tokens, seed=seed)
        except CorpusError:
            if text is texts[-1]:
                raise
            continue
        read = int(windows.lengths.sum())
        if tokens - read <= 1:  # a single token more makes no window
            read = tokens
            break
    note(text.read(read, tokens))
    return windows


@dataclass(frozen=True)
class TextRead:
    """A text that calibrated, repaired or trained a model.

    Attributes:
        corpus: name of the corpus.
        sha256: hashes of the documents of the split read, and of the split that selected weights or candidates.
    """

    corpus: str
    sha256: tuple[str, ...]


def texts_read(provenance: Provenance) -> Iterator[TextRead]:
    """Yield the texts that the steps of a provenance read."""
    for step in provenance.steps:
        search = (step.get("notes") or {}).get("search") or {}
        for text in (step.get("calibration"), step.get("method"), search.get("text")):
            if isinstance(text, dict) and "corpus_sha256" in text:
                hashes = (text["corpus_sha256"], text.get("validation_corpus_sha256"))
                yield TextRead(text["corpus"], tuple(filter(None, hashes)))


def check_unread(provenance: Provenance, corpus: Splits) -> None:
    """Raise CorpusError where a model was made with part of a corpus, before a measurement on all of it.

    The hash of a split's documents identifies a corpus, whatever its path now.
    """
    read = corpus["calibration"] + corpus["train"]
    known = {split.sha256 for split in (*corpus.values(), read) if split.documents}
    for text in texts_read(provenance):
        if known & {*text.sha256}:
            unread = "--split test, which it has not read" if corpus["test"].documents else "another text"
            raise CorpusError(
                f"the model was made with text of {corpus[ALL].name!r}, so that a figure over all of it would look "
                f"too good; accepted: {unread}"
            )
