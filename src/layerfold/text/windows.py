"""Token windows: documents joined to one stream and cut, with each token scored once."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from layerfold.errors import CorpusError, InputError
from layerfold.text.corpora import Corpus
from layerfold.text.units import Units, units_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DOCUMENTS_A_CALL = 64


@dataclass(frozen=True)
class TokenWindows:
    """Token windows of one corpus.

    Attributes:
        input_ids: (windows, context) int64; a shorter last window is padded on its right.
        lengths: (windows,) int64, number of real tokens in each window.
        first_scored: (windows,) int64, first position whose token is scored; earlier ones are context.
        document_starts: (documents,) int64, start of each document in the stream of tokens. The end-of-text token after
            a document belongs to it.
        bytes: raw UTF-8 bytes of the scored tokens, over all windows.
        context, stride: in tokens.
        corpus, split, corpus_sha256: source of the text.
        lead: number of tokens that every window begins with and that are not of the stream: 1 where the tokenizer
            begins each text with a token.
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
    lead: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def tokens(self) -> int:
        """Number of scored tokens."""
        return int((self.lengths - self.first_scored).sum())

    @cached_property
    def sha256(self) -> str:
        """Hash of the token ids and of their scored positions."""
        digest = hashlib.sha256(f"{self.context},{self.stride};".encode())
        for tensor in (self.input_ids, self.lengths, self.first_scored):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def units(self) -> Units:
        """Documents, for intervals."""
        starts = torch.arange(len(self)) * self.stride - self.lead
        return units_of(starts + self.first_scored, starts + self.lengths, self.document_starts)

    def pieces(self, batch: slice | list[int], scored: Tensor) -> Tensor:
        """Return the piece (see `Units`) of each scored token of some windows, (tokens,) int64.

        Args:
            scored: (windows, context) bool, whether each token is scored.
        """
        row, position = torch.nonzero(scored).unbind(1)
        window = torch.arange(len(self))[batch][row]
        return self.units.piece_of(window, window * self.stride + position - self.lead)

    def batches(self, tokens: int) -> list[slice]:
        """Slices of windows with about this many tokens each, at least one window."""
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
) -> TokenWindows:
    """Join documents with the end-of-text token and cut the stream into windows.

    Where the tokenizer begins each text with a token, as Gemma's and Llama 3's, so does every window: these models were
    never trained on text without it.

    Args:
        context: window length in tokens.
        stride: step from window to window; by default they are disjoint. A token is scored in the first window that
            holds it. The first token of a window has no context and is not scored.
        limit_tokens: stop after this many tokens of the stream; an error if there are fewer than one window.
        seed: seed of a random order of the documents; None keeps the corpus's order.
        whole: drop a last window that is not full, so that there is no padding.

    Raises:
        InputError: a context or stride out of range.
        CorpusError: less text than one window of at least two tokens.
    """
    first = _first(tokenizer)
    lead, least = len(first), 2 + len(first)
    if context < least:
        raise InputError(f"context {context}: at least {least} tokens are needed to predict one")
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise InputError(f"stride {stride}; accepted: 1 ... {context} (the context)")
    own = context - lead  # of the stream
    stride = min(own, stride)
    if limit_tokens is not None and limit_tokens < 2:
        raise InputError(f"limit of {limit_tokens} tokens; accepted: 2 or more")
    documents = list(corpus.documents)
    if seed is not None:
        random.Random(seed).shuffle(documents)
    ids, widths, document_starts = _stream(documents, tokenizer, limit_tokens)
    if len(ids) < (own if whole else min(own, limit_tokens or own)):
        raise CorpusError(
            f"corpus {corpus.name!r} split {corpus.split!r} has {len(ids):,} tokens; "
            f"at least one window of {own:,} is needed"
        )
    starts = list(range(0, len(ids) - 1 + lead, stride))
    while len(starts) > 1 and starts[-2] + own >= len(ids):
        starts.pop()  # the window before it reaches the end already
    if whole:
        starts = [start for start in starts if start + own <= len(ids)]
    begin = torch.tensor(starts)
    lengths = (len(ids) - begin).clamp_max(own) + lead
    overlap = begin[:-1] + own - begin[1:] + lead
    first_scored = torch.cat([torch.ones(1, dtype=torch.int64), overlap.clamp_min(1)])
    upto = pad(widths.cumsum(0), (1, 0))
    stream = pad(ids, (0, own))[begin[:, None] + torch.arange(own)]
    return TokenWindows(
        input_ids=torch.cat([torch.tensor(first, dtype=torch.int64).expand(len(stream), lead), stream], dim=1),
        lengths=lengths,
        first_scored=first_scored,
        document_starts=document_starts,
        bytes=int((upto[begin + lengths - lead] - upto[begin + first_scored - lead]).sum()),
        context=context,
        stride=stride,
        corpus=corpus.name,
        split=corpus.split,
        corpus_sha256=corpus.sha256,
        lead=lead,
    )


def _first(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token that the tokenizer begins each text with, if there is one."""
    begun: list[int] = tokenizer("a").input_ids
    return begun[:1] if begun[:1] == [tokenizer.bos_token_id] else []


def _stream(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, the raw bytes of each (0 for end-of-text), and the start of each document."""
    if not tokenizer.is_fast:
        raise InputError("the tokenizer cannot map its tokens to bytes; accepted: a fast one (tokenizer.json)")
    end_of_text = tokenizer.eos_token_id
    if end_of_text is None:
        raise InputError("the tokenizer has no end-of-text token to join documents with")
    ids: list[int] = []
    widths: list[int] = []
    starts: list[int] = []
    for tokens, token_widths in _encode(documents, tokenizer):
        if ids:
            ids.append(end_of_text)
            widths.append(0)
        starts.append(len(ids))
        ids += tokens
        widths += token_widths
        if limit is not None and len(ids) >= limit:
            break
    starts = [start for start in starts if start < len(ids[:limit])]
    stream, bytes_of_tokens, begin = (torch.tensor(x, dtype=torch.int64) for x in (ids[:limit], widths[:limit], starts))
    return stream, bytes_of_tokens, begin


def _encode(documents: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[list[int], list[int]]]:
    """Yield each document's token ids, and their widths in bytes."""
    for first in range(0, len(documents), _DOCUMENTS_A_CALL):
        group = documents[first : first + _DOCUMENTS_A_CALL]
        encoded = tokenizer(
            group, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        for document, ids, offsets in zip(group, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            yield ids, _byte_widths(document, [end for _, end in offsets])


def _byte_widths(document: str, ends: list[int]) -> list[int]:
    """Bytes of each token beyond the end of all tokens before it; ends are in characters."""
    if not document.isascii():
        upto = list(accumulate((len(char.encode("utf-8", "surrogatepass")) for char in document), initial=0))
        ends = [upto[end] for end in ends]
    return [end - before for before, end in pairwise(accumulate(ends, max, initial=0))]
