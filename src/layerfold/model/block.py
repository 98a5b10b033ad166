"""One transformer layer, and the matrices in it."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from layerfold.errors import InputError
from layerfold.model.factored import Factored
from layerfold.model.families import Family
from layerfold.model.ffn import FFN
from layerfold.model.matrix import Matrix


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
        if self.output("ffn") is None:
            raise InputError(f"block {self.index} has no FFN: it was dropped")
        self.check_plain()
        return FFN(self._part("ffn"), self.family)

    def check_plain(self) -> None:
        """Raise InputError where its FFN is a weight shared with other blocks and a low-rank delta."""
        if any(isinstance(module, Factored) for module in self._part("ffn").modules()):
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
        if self.output("attention") is None:
            raise InputError(f"block {self.index} has no attention: it was dropped")
        return Attention(self._part("attention"), self.family)

    @property
    def heads(self) -> int:
        """The number of its attention's groups of heads; 0 where that was removed."""
        return 0 if self.output("attention") is None else self.attention.heads

    @property
    def d_ffn(self) -> int:
        """The number of its FFN's neurons; 0 where that was removed."""
        down = self.output("ffn")
        return 0 if down is None else down.inputs

    def output(self, part: str) -> Matrix | None:
        """Return the matrix by which its ``attention`` or ``ffn`` writes into the residual stream.

        None where that part was removed.
        """
        module, family = self._part(part), self.family
        if isinstance(module, AbsentAttention | AbsentFFN):
            return None
        return Matrix(operator.attrgetter(family.down if part == "ffn" else family.attention_output)(module))

    def _part(self, part: str) -> nn.Module:
        module: nn.Module = operator.attrgetter(self.family.ffn if part == "ffn" else self.family.attention)(
            self.module
        )
        return module


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
            return (groups[:, None] * width + torch.arange(width, device=groups.device)).flatten()

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


PARTS = ("attention", "ffn")


class AbsentAttention(nn.Module):
    """Adds zero to the residual stream, and counts the tokens that it sees in the cache.

    Attributes:
        layer_idx: the block's index, by the name that transformers gives it.
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, past_key_values: Any = None, **_: Any) -> tuple[Tensor, None]:
        """Return zero, which broadcasts, and no attention weights."""
        if past_key_values is not None:
            # Positions and masks follow from the length of what is cached, and nothing cached counts as no length.
            batch, tokens, _width = hidden_states.shape
            one_channel = hidden_states.new_zeros(batch, 1, tokens, 1)
            past_key_values.update(one_channel, one_channel, self.layer_idx)
        return hidden_states.new_zeros(()), None


class AbsentFFN(nn.Module):
    """Adds zero to the residual stream."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return zero, which broadcasts."""
        return hidden_states.new_zeros(())
