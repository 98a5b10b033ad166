"""Units of scored tokens: the documents, which an interval takes to be independent."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from layerfold.maths.intervals import Floats

_MOST = 1000
"""Maximum number of units, which keeps the record of a text of very many documents small."""


class Units:
    """Documents, each of which is one observation: the tokens of a document are alike.

    Windows and units cut the scored tokens into pieces: the tokens of one unit in one window. Pieces are ordered by
    window, and within a window by unit.

    Args:
        first, end: (windows,), start and end of each window's scored tokens in the stream of tokens.
        starts: (units,), start of each unit in the stream, in order.
        kind: the unit's noun in a record, as ``documents``.
        documents: number of documents with a scored token; None takes the number of units with one.

    Attributes:
        tokens: (units,) float64, number of scored tokens in each unit.
        pieces: number of pieces.
    """

    def __init__(self, first: Tensor, end: Tensor, starts: Tensor, kind: str, documents: int | None = None) -> None:
        self.kind, self._starts = kind, starts.contiguous()
        low, high = self._unit_at(first), self._unit_at(end - 1)
        counts = high - low + 1
        self._window = torch.repeat_interleave(torch.arange(len(first)), counts)
        self._offsets = counts.cumsum(0) - counts - low  # a window's first piece less its unit
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
        """Return the piece of each scored token, (tokens,), from its window and its place in the stream."""
        return self._offsets[window] + self._unit_at(place)

    def by_window(self, sums: Floats) -> Floats:
        """Add up sums over pieces, (pieces,), to sums over windows, (windows,)."""
        return np.bincount(self._window.numpy(), sums).astype(np.float64, copy=False)

    def by_unit(self, sums: Floats) -> Floats:
        """Add up sums over pieces, (pieces,), to sums over units, (units,)."""
        return np.bincount(self._unit.numpy(), sums, minlength=len(self)).astype(np.float64, copy=False)

    def _unit_at(self, place: Tensor) -> Tensor:
        return torch.searchsorted(self._starts, place, right=True) - 1


def units_of(first: Tensor, end: Tensor, document_starts: Tensor) -> Units:
    """Return the units of windows: their documents.

    More than 1,000 documents are combined into groups of neighbours. A single scored document has its windows as units.

    Args:
        first, end: (windows,), start and end of each window's scored tokens in the stream of tokens.
        document_starts: (documents,), start of each document in the stream, in order.
    """
    by_document = Units(first, end, document_starts, "documents")
    documents = by_document.documents
    if documents < 2:
        return Units(first, end, first, "windows of one document", documents)
    if (size := -(-documents // _MOST)) == 1:
        return by_document
    return Units(first, end, document_starts[::size], f"groups of {size} documents", documents)
