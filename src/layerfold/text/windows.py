"""Documents -> one stream of tokens -> windows, each token of which is scored once."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerfold.errors import CorpusError, InputError
from layerfold.text.corpora import Corpus
from layerfold.text.units import Units, units_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DOCUMENTS_A_CALL = 64


@dataclass(frozen=True)
class Windows:
    """Token windows of one corpus.

    Attributes:
        input_ids: (windows, context) int64; the last window may be shorter and is then padded at its right.
        lengths: (windows,) int64, the number of real tokens in each.
        first_scored: (windows,) int64, the first position whose token is scored; those before it are context.
        document_starts: (documents,) int64, where in the stream of tokens each document begins. The end-of-text token
            after a document is of that document.
        bytes: raw UTF-8 bytes of the scored tokens, over all windows.
        context, stride: in tokens.
        corpus, split, corpus_sha256: where the text comes from.
    """

    input_ids: Tensor
    lengths: Tensor
    first_scored: Tensor
    document_starts: Tensor
    bytes: int
    context: int
    stride: int
    corpus: str
    split: str
    corpus_sha256: str

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def tokens(self) -> int:
        """How many tokens are scored."""
        return int((self.lengths - self.first_scored).sum())

    @cached_property
    def sha256(self) -> str:
        """Hash of the token ids and of which of them are scored."""
        digest = hashlib.sha256(f"{self.context},{self.stride};".encode())
        for tensor in (self.input_ids, self.lengths, self.first_scored):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def units(self) -> Units:
        """Documents, for intervals."""
        starts = torch.arange(len(self)) * self.stride
        return units_of(starts + self.first_scored, starts + self.lengths, self.document_starts)

    def pieces(self, batch: slice | list[int], scored: Tensor) -> Tensor:
        """Return the piece (see `Units`) of each scored token of some windows, (tokens,) int64.

        Args:
            scored: which of their tokens are, (windows, context) bool.
        """
        row, position = torch.nonzero(scored).unbind(1)
        window = torch.arange(len(self))[batch][row]
        return self.units.piece_of(window, window * self.stride + position)

    def batches(self, tokens: int) -> list[slice]:
        """Slices of windows that hold about this many tokens each, at least one window."""
        size = max(1, tokens // self.context)
        return [slice(start, min(start + size, len(self))) for start in range(0, len(self), size)]


def cut_windows(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    stride: int | None = None,
    limit_tokens: int | None = None,
    seed: int | None = None,
    whole: bool = False,
) -> Windows:
    """Join documents with the end-of-text token and cut the stream into windows.

    Args:
        context: window length in tokens.
        stride: how far each window advances; `context` (the default) makes them disjoint. A token is scored in the
            first window that holds it; the first token of a window of a disjoint cut has nothing before it and is
            not scored.
        limit_tokens: stop after this many tokens of the stream; an error if there are fewer than one window.
        seed: take the documents in a random order; None keeps the corpus's.
        whole: leave out what does not fill a window at the end, so that there is no padding.

    Raises:
        InputError: a context or stride out of range.
        CorpusError: less text than one window of at least two tokens.
    """
    stride = context if stride is None else stride
    if context < 2:
        raise InputError(f"context {context}: at least 2 tokens are needed to predict one")
    if not 1 <= stride <= context:
        raise InputError(f"stride {stride}; accepted: 1 ... {context} (the context)")
    if limit_tokens is not None and limit_tokens < 2:
        raise InputError(f"limit of {limit_tokens} tokens; accepted: 2 or more")
    documents = list(corpus.documents)
    if seed is not None:
        random.Random(seed).shuffle(documents)
    ids, widths, document_starts = _stream(documents, tokenizer, limit_tokens)
    if len(ids) < (context if whole else min(context, limit_tokens or context)):
        raise CorpusError(
            f"corpus {corpus.name!r} split {corpus.split!r} has {len(ids):,} tokens; "
            f"at least one window of {context:,} is needed"
        )
    starts = list(range(0, len(ids) - 1, stride))
    while len(starts) > 1 and starts[-2] + context >= len(ids):
        starts.pop()  # the window before it already reaches the end
    if whole:
        starts = [start for start in starts if start + context <= len(ids)]
    input_ids = torch.zeros(len(starts), context, dtype=torch.int64)
    lengths, first_scored = [], []
    for row, start in enumerate(starts):
        window = ids[start : start + context]
        input_ids[row, : len(window)] = window
        lengths.append(len(window))
        first_scored.append(1 if row == 0 else max(1, starts[row - 1] + context - start))
    scored_bytes = sum(
        int(widths[start + first : start + length].sum())
        for start, first, length in zip(starts, first_scored, lengths, strict=True)
    )
    return Windows(
        input_ids=input_ids,
        lengths=torch.tensor(lengths),
        first_scored=torch.tensor(first_scored),
        document_starts=document_starts,
        bytes=scored_bytes,
        context=context,
        stride=stride,
        corpus=corpus.name,
        split=corpus.split,
        corpus_sha256=corpus.sha256,
    )


def _stream(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, the raw bytes of each (none for end-of-text), and where each document begins."""
    if not tokenizer.is_fast:
        raise InputError(
            "the tokenizer cannot tell which bytes its tokens stand for; accepted: a fast one (tokenizer.json)"
        )
    end_of_text = tokenizer.eos_token_id
    if end_of_text is None:
        raise InputError("the tokenizer has no end-of-text token to join documents with")
    ids: list[int] = []
    widths: list[int] = []
    starts: list[int] = []
    for document, tokens, ends in _encode(documents, tokenizer):
        if ids:
            ids.append(end_of_text)
            widths.append(0)
        starts.append(len(ids))
        ids += tokens
        widths += _byte_widths(document, ends)
        if limit is not None and len(ids) >= limit:
            break
    stream, bytes_of_each = (torch.tensor(each[:limit], dtype=torch.int64) for each in (ids, widths))
    return stream, bytes_of_each, torch.tensor([start for start in starts if start < len(stream)], dtype=torch.int64)


def _encode(documents: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, list[int], list[int]]]:
    for first in range(0, len(documents), _DOCUMENTS_A_CALL):
        group = documents[first : first + _DOCUMENTS_A_CALL]
        encoded = tokenizer(
            group, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        for document, ids, offsets in zip(group, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            yield document, ids, [end for _, end in offsets]


def _byte_widths(document: str, ends: list[int]) -> list[int]:
    """Bytes up to each token's end less those up to the token's before it; ends are in characters."""
    if document.isascii():
        reached = ends
    else:
        upto = [0]
        for character in document:
            upto.append(upto[-1] + len(character.encode("utf-8", "surrogatepass")))
        reached = [upto[end] for end in ends]
    widths, before = [], 0
    for end in reached:
        widths.append(max(0, end - before))
        before = max(before, end)
    return widths
