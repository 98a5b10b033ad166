"""Scored tokens by document: what an interval takes to be independent of each other."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from layerfold.maths.intervals import Floats

_MOST = 1000
"""Units at most, so that what is kept of a text of very many documents stays small."""


class Units:
    """Documents, each of which is one observation: the tokens of a document are alike.

    Windows and units cut the scored tokens into pieces: the tokens of one unit in one window. Pieces are ordered by
    window, and within a window by unit.

    Args:
        first, end: (windows,), where in the stream of tokens the scored tokens of each window begin and end.
        starts: (units,), where in the stream each unit begins, in order.
        kind: what a unit is, in words.
        documents: how many documents have a token that is scored; None for as many as units do.

    Attributes:
        tokens: (units,) float64, how many tokens of each are scored.
        pieces: how many pieces there are.
    """

    def __init__(self, first: Tensor, end: Tensor, starts: Tensor, kind: str, documents: int | None = None) -> None:
        self.kind, self._starts = kind, starts.contiguous()
        low, high = self._unit_at(first), self._unit_at(end - 1)
        counts = high - low + 1
        self._window = torch.repeat_interleave(torch.arange(len(first)), counts)
        self._offsets = counts.cumsum(0) - counts - low  # of the piece of a window's first unit, less that unit
        self._unit = torch.arange(len(self._window)) - self._offsets[self._window]
        self.pieces = len(self._unit)
        unit_ends = torch.cat([self._starts[1:], end[-1:]])
        begin = torch.maximum(first[self._window], self._starts[self._unit])
        tokens = torch.minimum(end[self._window], unit_ends[self._unit]) - begin
        self.tokens = self.by_unit(tokens.double().numpy())
        self.documents = int((self.tokens > 0).sum()) if documents is None else documents

    def __len__(self) -> int:
        return len(self._starts)

    def piece_of(self, window: Tensor, place: Tensor) -> Tensor:
        """Return the piece of each of some scored tokens, from its window and its place in the stream, (tokens,)."""
        return self._offsets[window] + self._unit_at(place)

    def by_window(self, sums: Floats) -> Floats:
        """Add up what is summed over pieces, (pieces,), to sums over windows, (windows,)."""
        return np.bincount(self._window.numpy(), sums).astype(np.float64, copy=False)

    def by_unit(self, sums: Floats) -> Floats:
        """Add up what is summed over pieces, (pieces,), to sums over units, (units,)."""
        return np.bincount(self._unit.numpy(), sums, minlength=len(self)).astype(np.float64, copy=False)

    def _unit_at(self, place: Tensor) -> Tensor:
        return torch.searchsorted(self._starts, place, right=True) - 1


def units_of(first: Tensor, end: Tensor, document_starts: Tensor) -> Units:
    """Return the units of windows: their documents.

    Of more than 1,000 documents, neighbours are taken together. Where only one document is scored, its windows are the
    units.

    Args:
        first, end: (windows,), where in the stream of tokens the scored tokens of each window begin and end.
        document_starts: (documents,), where in the stream each document begins, in order.
    """
    by_document = Units(first, end, document_starts, "documents")
    documents = by_document.documents
    if documents < 2:
        return Units(first, end, first, "windows of one document", documents)
    if (size := -(-documents // _MOST)) == 1:
        return by_document
    return Units(first, end, document_starts[::size], f"groups of {size} documents", documents)
