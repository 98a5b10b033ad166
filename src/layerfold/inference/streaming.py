"""Passing a text through a decoder's blocks, some at a time, with the states between them in temporary files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import copy

import torch
from torch import Tensor

from layerfold.inference.spool import Spool
from layerfold.inference.stepping import Stepper
from layerfold.memory import room
from layerfold.model.decoder import Decoder
from layerfold.text.windows import TokenWindows

_ACTIVATIONS = 6
"""Copies of a block's widest activation that are held at once, about."""


class Stream:
    """A text and where in a decoder it is.

    Args:
        stepper: of the decoder; its blocks may be edited while the stream is before them.
        windows: the text.

    Attributes:
        states: what enters the next block, (windows, tokens, d_model).
    """

    def __init__(self, stepper: Stepper, windows: TokenWindows) -> None:
        self.stepper, self.windows = stepper, windows
        self.batches = windows.batches(batch_tokens(stepper.decoder))
        self.states = self.spool()
        for batch in self.batches:
            self.states[batch] = stepper.embed(windows.input_ids[batch])

    def spool(self) -> Spool:
        """Return room for the states at one place."""
        decoder = self.stepper.decoder
        return Spool((len(self.windows), self.windows.context, decoder.d_model), decoder.dtype, decoder.device)

    def walk(self, blocks: Iterable[int], stepper: Stepper | None = None) -> Iterator[tuple[slice, int, Tensor]]:
        """Run some blocks, those that follow, in order; the stream stays where it is.

        Args:
            stepper: of another decoder of the same shape, whose blocks are run instead.

        Yields:
            For each batch and block the windows of the batch, the block's index and what leaves it, right after it has
            run.
        """
        indices, stepper = list(blocks), stepper or self.stepper
        with stepper.decoder.resident(indices):
            stepper.decoder.ahead(max(indices, default=-1) + 1)
            for batch in self.batches:
                hidden = self.states[batch]
                for index in indices:
                    hidden = stepper.step(index, hidden)
                    yield batch, index, hidden
                del hidden
                room.release()

    def advance(self, blocks: Iterable[int]) -> None:
        """Move the stream behind some blocks, those that follow, in order."""
        self.states = self.passed(blocks, self.states)

    def passed(self, blocks: Iterable[int], into: Spool | None = None) -> Spool:
        """Return what leaves the last of some blocks, the stream staying where it is.

        Args:
            into: where to write it; None makes room of its own.
        """
        indices = list(blocks)
        if not indices:
            return self.states
        left = self.spool() if into is None else into
        if self.stepper.decoder.offloaded:  # one block at a time, over all of the text
            here = copy(self)
            for index in indices:
                for batch, _, hidden in here.walk([index]):
                    left[batch] = hidden
                here.states = left
            return left
        for batch, index, hidden in self.walk(indices):
            if index == indices[-1]:
                left[batch] = hidden
        return left

    def holds_text(self, batch: slice) -> Tensor:
        """Say which positions of a batch hold text, (windows, tokens)."""
        return torch.arange(self.windows.context) < self.windows.lengths[batch][:, None]

    def rows(self, batch: slice, activations: Tensor) -> Tensor:
        """Return a batch's activations, (windows, tokens, width), at the positions that hold text: (rows, width)."""
        if int(self.windows.lengths[batch].min()) == self.windows.context:
            return activations.reshape(-1, activations.shape[-1])
        return taken(activations, self.holds_text(batch))


def batch_tokens(decoder: Decoder, states: int = 1) -> int:
    """Return how many tokens to run through a decoder at once.

    Args:
        states: how many hidden states of a token are held.
    """
    widest = max(decoder.d_model, *decoder.d_ffn)
    return room.batch_tokens(decoder.device, _ACTIVATIONS * widest + states * decoder.d_model)


def taken(activations: Tensor, positions: Tensor) -> Tensor:
    """Return activations, (windows, tokens, width), at some positions, (windows, tokens) bool: (rows, width).

    OPT's FFN reads (windows * tokens, width); that will do too.

    The processor counts the positions, so that a GPU need not wait for their number.
    """
    rows = positions.flatten().nonzero()[:, 0]
    return activations.reshape(-1, activations.shape[-1])[rows.to(activations.device)]
