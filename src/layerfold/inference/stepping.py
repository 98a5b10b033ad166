"""Run a decoder one block at a time, whatever its architecture hands its blocks besides the hidden states; and fast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layerfold.model.decoder import Decoder

_Call = tuple[tuple[Any, ...], dict[str, Any]]


class Stepper:
    """Steps hidden states through a decoder's blocks.

    What else a block is called with (masks, positions, rotary tables) is recorded once for each shape of input, from
    the model's own forward pass with the blocks passed over. Inputs are right-padded at most: with causal attention
    nothing after a token changes it, so no mask is needed, and padded positions are to be ignored.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._own = [block.module for block in decoder.blocks]
        self._blocks = [*self._own]
        self._calls: dict[torch.Size, list[_Call]] = {}

    def like(self, decoder: Decoder) -> Stepper:
        """Return one for a decoder of the same shape, which steps through what this one has embedded."""
        found = Stepper(decoder)
        found._calls = self._calls
        return found

    def replace(self, index: int, module: nn.Module) -> None:
        """Step through another module in place of a block from now on; the decoder stays as it is."""
        self._blocks[index] = module

    @torch.no_grad()
    def embed(self, input_ids: Tensor) -> Tensor:
        """Return the first block's input, (windows, tokens, d_model), for token ids, (windows, tokens), anywhere."""
        self.decoder.check_ids(input_ids)
        input_ids = input_ids.to(self.decoder.device)
        calls: list[_Call] = []
        first: list[Tensor] = []

        def passing(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, None]:
            first.append(hidden)
            calls.append((args, kwargs))
            return (hidden, None) if self.decoder.family.tuples else hidden

        for block in self._own:
            block.forward = passing
        try:
            self.decoder.model.base_model(input_ids=input_ids, use_cache=False)
        finally:
            for block in self._own:
                del block.forward
        self._calls[first[0].shape] = calls
        return first[0]

    @torch.no_grad()
    def step(self, index: int, hidden: Tensor) -> Tensor:
        """Run one block on hidden states of a shape that `embed` has returned."""
        return self.run(index, hidden)

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """Do what `step` does, with gradients where they are on."""
        args, kwargs = self._calls[hidden.shape][index]
        block: nn.Module = self._blocks[index]
        result: Tensor | tuple[Tensor, ...] = block(hidden, *args, **kwargs)
        return result[0] if isinstance(result, tuple) else result


@contextmanager
def fused_activations(model: nn.Module) -> Iterator[None]:
    """Run GPT-2's activation, written out as six passes over memory, as the one kernel that computes the same."""
    swapped = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child).__name__ == "NewGELUActivation"
    ]
    for parent, name, _ in swapped:
        setattr(parent, name, nn.GELU("tanh"))
    try:
        yield
    finally:
        for parent, name, child in swapped:
            setattr(parent, name, child)
