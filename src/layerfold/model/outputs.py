"""The matrices by which sublayers write into the residual stream."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, nn

from layerfold.errors import InputError
from layerfold.model.block import Block
from layerfold.model.decoder import Decoder
from layerfold.model.matrix import Matrix

FLOOR = 1e-6
"""Smallest mean square of a state; norms add about as much before they divide."""


class Output(Matrix):
    """A matrix by which a sublayer writes into the residual stream, and what becomes of its output on the way.

    Args:
        scale: what the output is multiplied by.
        norm: a norm of the output, before it is added; None where there is none.

    Where there is a norm, y = g z / |z| for the output z, the change of y for a small change of z is taken for that at
    the same |z|.
    """

    def __init__(self, module: nn.Module, scale: float = 1.0, norm: nn.Module | None = None) -> None:
        super().__init__(module)
        self.scale, self._norm = scale, norm

    @property
    def normed(self) -> bool:
        """Whether there is a norm."""
        return self._norm is not None

    @property
    def constant(self) -> bool:
        """Whether a bias can be fitted too."""
        return self.bias is not None and self._norm is None

    def features(self, inputs: Tensor) -> Tensor:
        """Return what a change of `weight` multiplies on its way into the residual stream, (..., in)."""
        found = super().features(inputs)
        if self._norm is not None:
            output = self.module.forward(inputs).float()  # without the hooks that watch it
            found = found * (output.square().mean(-1, keepdim=True) + FLOOR).rsqrt()
        return found if self.scale == 1 else found * self.scale

    def before(self, missed: Tensor) -> Tensor:
        """Return what the norm's input misses, for what the residual stream misses, (..., d_model)."""
        if self._norm is None:
            return missed
        gains = self._norm(missed.new_ones(1, missed.shape[-1], dtype=self.weight.dtype))[0].float()
        seen = gains.abs() > FLOOR * gains.abs().max()  # a channel of gain 0 writes nothing
        return torch.where(seen, missed / torch.where(seen, gains, 1.0), 0.0)

    def add_(self, weight: Tensor, bias: Tensor | None, share: float = 1.0) -> None:
        """Add a change to the weight, and to the bias where one was fitted."""
        self.weight.add_(weight, alpha=share)
        if bias is not None and (own := self.bias) is not None:
            own.add_(bias, alpha=share / self.scale)


def refittable(decoder: Decoder, block: Block | int, part: str) -> Output | None:
    """Return the matrix of a block's ``attention`` or ``ffn`` that a repair refits; None where that part was removed.

    Args:
        block: its index, or a version of one of the decoder's blocks.

    Raises:
        InputError: it holds pruned weights, whose zeros are to stay, or norms follow the residual stream.
    """
    block, family = decoder.blocks[block] if isinstance(block, int) else block, decoder.family
    found = block.output(part)
    if family.stream_norms:
        raise InputError(
            f"repair of a {decoder.model.config.model_type} whose norms are of the residual stream itself: what leaves "
            "a block is not linear in its weights; accepted: none"
        )
    if found is not None and found.holds_zeros:
        raise InputError(
            "a repair refits whole matrices, and would fill zeros that are to stay; accepted: neurons, where "
            "weights are pruned"
        )
    after = family.ffn_after if part == "ffn" else family.attention_after
    norm = operator.attrgetter(after)(block.module) if found is not None and after else None
    return None if found is None else Output(found.module, decoder.configured.residual_scale, norm)
