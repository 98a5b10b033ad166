"""One transformer layer, and the matrices in it."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from layerfold.attention import Attention
from layerfold.errors import InputError
from layerfold.factored import Factored
from layerfold.families import Family
from layerfold.ffn import FFN, Matrix
from layerfold.sublayers import AbsentAttention, AbsentFFN


@dataclass(frozen=True)
class Block:
    """One transformer layer."""

    index: int
    module: nn.Module
    family: Family

    @cached_property
    def ffn(self) -> FFN:
        """Its feed-forward part.

        Raises:
            InputError: it was removed, or its matrices are not plain ones but have a delta.
        """
        ffn: nn.Module = operator.attrgetter(self.family.ffn)(self.module)
        if isinstance(ffn, AbsentFFN):
            raise InputError(f"block {self.index} has no FFN: it was dropped")
        self.check_plain()
        return FFN(ffn, self.family)

    def check_plain(self) -> None:
        """Raise InputError where its FFN is a weight shared with other blocks and a low-rank delta."""
        ffn: nn.Module = operator.attrgetter(self.family.ffn)(self.module)
        if any(isinstance(module, Factored) for module in ffn.modules()):
            raise InputError(
                f"block {self.index} has a low-rank delta on an FFN that it shares; accepted: plain weights, as "
                "`layerfold export --to dense` writes them"
            )

    @cached_property
    def attention(self) -> Attention:
        """Its attention.

        Raises:
            InputError: it was removed.
        """
        attention: nn.Module = operator.attrgetter(self.family.attention)(self.module)
        if isinstance(attention, AbsentAttention):
            raise InputError(f"block {self.index} has no attention: it was dropped")
        return Attention(attention, self.family)

    @property
    def heads(self) -> int:
        """The number of its attention's groups of heads; 0 where that was removed."""
        attention: nn.Module = operator.attrgetter(self.family.attention)(self.module)
        return 0 if isinstance(attention, AbsentAttention) else self.attention.heads

    @property
    def d_ffn(self) -> int:
        """The number of its FFN's neurons; 0 where that was removed."""
        ffn: nn.Module = operator.attrgetter(self.family.ffn)(self.module)
        if isinstance(ffn, AbsentFFN):
            return 0
        return Matrix(operator.attrgetter(self.family.down)(ffn)).weight.shape[1]


@dataclass(frozen=True)
class Projection:
    """One matrix of a block's attention or FFN, or a table of token embeddings.

    Attributes:
        name: its weight's, in the model.
        block: the block's index; None for a table outside of them.
        part: ``attention`` or ``ffn``; what table it is.
        matrix: the view of it.
    """

    name: str
    block: int | None
    part: str
    matrix: Matrix
