"""Passing a text through a decoder's blocks, some at a time, with the states between them in temporary files."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from layerfold.inference import memory
from layerfold.inference.spool import Spool
from layerfold.inference.stepping import Stepper
from layerfold.text.windows import Windows

_BATCH_TOKENS = 1024


class Stream:
    """A text and where in a decoder it is.

    Args:
        stepper: of the decoder; its blocks may be edited while the stream is before them.
        windows: the text.

    Attributes:
        states: what enters the next block, (windows, tokens, d_model).
    """

    def __init__(self, stepper: Stepper, windows: Windows) -> None:
        self.stepper, self.windows = stepper, windows
        self.batches = windows.batches(_BATCH_TOKENS)
        self.states = self.spool()
        for batch in self.batches:
            self.states[batch] = stepper.embed(windows.input_ids[batch])

    def spool(self) -> Spool:
        """Return room for the states at one place."""
        return Spool((len(self.windows), self.windows.context, self.stepper.decoder.d_model))

    def passed(self, blocks: Iterable[int], visit: Callable[[slice, int, Tensor], None] | None = None) -> Spool:
        """Return what leaves the last of some blocks, the stream staying where it is.

        Args:
            blocks: those that follow, in order.
            visit: takes the windows of a batch, a block's index and what leaves it, right after it has run.
        """
        indices, left = list(blocks), self.spool()
        for batch in self.batches:
            hidden = self.states[batch]
            for index in indices:
                hidden = self.stepper.step(index, hidden)
                if visit is not None:
                    visit(batch, index, hidden)
            left[batch] = hidden
            memory.release()
        return left

    def real(self, batch: slice) -> Tensor:
        """Where a batch's windows hold text, (windows, tokens)."""
        return torch.arange(self.windows.context) < self.windows.lengths[batch][:, None]
