"""The tensors that a decoder does not share with others."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from layerfold.decoder import Decoder
from layerfold.spool import Stowed


class Apart:
    """A decoder whose own tensors, those that no other has, can wait in a temporary file.

    Args:
        decoder: nothing writes into its own tensors from now on.
        beside: decoders that it may share tensors with.

    Attributes:
        own: the tensors, in memory until they are stowed.
    """

    def __init__(self, decoder: Decoder, *beside: Decoder) -> None:
        self.decoder = decoder
        shared = {id(tensor) for other in beside for tensor in _tensors(other)}
        self.own = Stowed(tensor for tensor in _tensors(decoder) if id(tensor) not in shared)


def _tensors(decoder: Decoder) -> Iterator[Tensor]:
    yield from decoder.model.parameters()
    yield from decoder.model.buffers()
