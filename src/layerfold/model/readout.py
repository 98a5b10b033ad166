"""The matrices that write into the residual stream: the last of each block's attention and FFN."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

from layerfold.errors import InputError
from layerfold.model.block import AbsentAttention, AbsentFFN, Block
from layerfold.model.factored import Factored
from layerfold.model.ffn import MASK, Matrix


class Readout:
    """A live view of the map from what a sublayer computes to what it adds to the residual stream.

    Of a matrix that blocks share with a low-rank delta, W + A B, it is A, which reads B x and is the block's own.

    Attributes:
        part: ``attention`` or ``ffn``.
    """

    def __init__(self, module: nn.Module, part: str) -> None:
        self.module: Any = module
        self.part = part
        mask: Tensor | None = getattr(module, MASK, None)
        if mask is not None and not mask.all():
            raise InputError(
                "a repair refits whole matrices, and would fill zeros that are to stay; accepted: neurons, where "
                "weights are pruned"
            )

    @property
    def _delta(self) -> bool:
        return isinstance(self.module, Factored)

    @property
    def key(self) -> int:
        """The same for two readouts that are one matrix."""
        return id(self.module.a if self._delta else self.module.weight)

    @property
    def weight(self) -> Tensor:
        """(out, features); writing into it changes the model."""
        found: Tensor = self.module.a.detach() if self._delta else Matrix(self.module).weight
        return found

    @property
    def bias(self) -> Tensor | None:
        """(out,), or None; writing into it changes the model."""
        return Matrix(self.module).bias

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """`weight`, and `bias` where there is one."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def own_(self) -> None:
        """Use parameters of its own from now on, but for a weight that blocks share beside a delta."""
        shared = self.module.weight
        Matrix(self.module).own_()
        if self._delta:
            self.module.weight = shared

    def features(self, inputs: Tensor) -> Tensor:
        """Return what `weight` multiplies, (..., features), for what the module reads, (..., in)."""
        return linear(inputs, self.module.b.detach()) if self._delta else inputs


def ffn_readout(block: Block) -> Readout | None:
    """Return that of a block's FFN; None where it was dropped."""
    ffn: nn.Module = operator.attrgetter(block.family.ffn)(block.module)
    return None if isinstance(ffn, AbsentFFN) else Readout(operator.attrgetter(block.family.down)(ffn), "ffn")


def attention_readout(block: Block) -> Readout | None:
    """Return that of a block's attention; None where it was dropped."""
    attention: nn.Module = operator.attrgetter(block.family.attention)(block.module)
    if isinstance(attention, AbsentAttention):
        return None
    return Readout(operator.attrgetter(block.family.attention_output)(attention), "attention")


@contextmanager
def reading(readouts: Iterable[Readout | Matrix]) -> Iterator[dict[int, Tensor]]:
    """Yield a dict that a forward pass fills with what each one's module reads, by the module's id."""
    found: dict[int, Tensor] = {}

    def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        found[id(module)] = arguments[0]

    handles = [readout.module.register_forward_pre_hook(keep) for readout in readouts]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
