"""A live view of a block's attention, by the heads in it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn

from layerfold.families import Family
from layerfold.ffn import Matrix

FUSED = 3
"""How many matrices are one, side by side, where queries, keys and values come from a single one."""


class Attention:
    """A block's attention as groups of heads.

    A *group* is one head of keys and values with the query heads that read it; where every query head has its own
    keys and values, each head is a group.
    """

    def __init__(self, module: nn.Module, family: Family) -> None:
        self.module: Any = module
        self.inputs = [Matrix(operator.attrgetter(name)(module)) for name in family.attention_inputs]
        self.output = Matrix(operator.attrgetter(family.attention_output)(module))

    @property
    def channels(self) -> int:
        """How many of the channels that the output matrix reads are a group's."""
        return int(self.module.head_dim) * int(getattr(self.module, "num_key_value_groups", 1))

    @property
    def heads(self) -> int:
        """The number of groups."""
        return self.output.weight.shape[1] // self.channels

    @property
    def units(self) -> list[Tensor]:
        """All that goes with a group of heads, each (groups, parameters): the group comes first."""
        parts = FUSED if len(self.inputs) == 1 else 1
        made = [
            tensor.unflatten(0, (parts, self.heads, -1)).transpose(0, 1).flatten(1)
            for matrix in self.inputs
            for tensor in matrix.tensors
        ]
        return [*made, self.output.weight.T.reshape(self.heads, -1)]

    def keep_(self, groups: Tensor) -> None:
        """Keep only these groups, (kept,) indices; the parameters are new ones."""
        was, d_head = self.heads, int(self.module.head_dim)

        def channels(width: int) -> Tensor:
            return (groups[:, None] * width + torch.arange(width)).flatten()

        self.output.keep_(inputs=channels(self.channels))
        if len(self.inputs) == 1:
            fused = [place * was * d_head + channels(d_head) for place in range(FUSED)]
            self.inputs[0].keep_(outputs=torch.cat(fused))
            # GPT-2's forward pass splits by this; what it remembers of the number of heads it does not use.
            self.module.num_heads, self.module.split_size = len(groups), len(groups) * d_head
            return
        queries, *others = self.inputs
        queries.keep_(outputs=channels(self.channels))
        for each in others:
            each.keep_(outputs=channels(d_head))
