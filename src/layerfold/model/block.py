"""One transformer layer, and the matrices in it."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
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

PARTS = ("attention", "ffn")


@dataclass(frozen=True)
class Block:
    """One transformer layer.

    Attributes:
        index: its place.
        module: what computes it.
        family: where its parts are.
        queries: number of query heads that read one head of keys and values.
    """

    index: int
    module: nn.Module
    family: Family
    queries: int = 1

    @cached_property
    def ffn(self) -> FFN:
        """Its feed-forward part.

        Raises:
            InputError: it was removed, has no neurons, or its matrices are not plain ones but have a delta.
        """
        if self.output("ffn") is None:
            raise InputError(f"block {self.index} has no FFN: it was dropped")
        self.check_plain()
        return FFN(self.part("ffn"), self.family)

    def check_plain(self) -> None:
        """Raise InputError where its FFN is a weight shared with other blocks and a low-rank delta."""
        if any(isinstance(module, Factored) for module in self.part("ffn").modules()):
            raise InputError(
                f"block {self.index} has a low-rank delta on an FFN that it shares; accepted: plain weights, as "
                "`layerfold export --to dense` writes them"
            )

    @cached_property
    def attention(self) -> Attention:
        """Its attention.

        Raises:
            InputError: it was removed, or it is none with heads.
        """
        if self.output("attention") is None:
            raise InputError(f"block {self.index} has no attention: it was dropped")
        if not self.attends:
            raise InputError(f"block {self.index} has no attention but {type(self.part('attention')).__name__}")
        return Attention(self.part("attention"), self.family, self.queries)

    @cached_property
    def mixer(self) -> str:
        """The name of what lets its tokens read each other: the attention, or what a hybrid has in its place."""
        names = (self.family.attention, *dict(self.family.mixers))
        return next((name for name in names if name and hasattr(self.module, name)), "")

    @property
    def attends(self) -> bool:
        """Whether that is an attention whose matrices are known."""
        return self.mixer == self.family.attention and bool(self.family.attention_output)

    @property
    def heads(self) -> int:
        """The number of its attention's groups of heads; 0 where there is none."""
        return self.attention.heads if self.attends and not self.gone("attention") else 0

    @property
    def d_ffn(self) -> int:
        """The number of its FFN's neurons; 0 where that was removed, or has none."""
        down = self.output("ffn") if self.family.down else None
        return 0 if down is None else down.inputs

    def gone(self, part: str) -> bool:
        """Whether its ``attention`` or ``ffn`` was removed."""
        if part == "ffn" and not self.family.ffn and self.family.down:
            return isinstance(operator.attrgetter(self.family.down)(self.module), Absent)
        return bool(self.path(part)) and isinstance(self.part(part), AbsentAttention | Absent)

    def output(self, part: str) -> Matrix | None:
        """Return the matrix by which its ``attention`` or ``ffn`` writes into the residual stream.

        None where that part was removed.

        Raises:
            InputError: there is no such matrix, as in a mixture of experts.
        """
        if self.gone(part) or (part == "attention" and self.family.attention and not self.mixer):
            return None  # the latter in a hybrid's other blocks
        family = self.family
        outputs = {"ffn": family.down, family.attention: family.attention_output, **dict(family.mixers)}
        name = outputs["ffn" if part == "ffn" else self.mixer]
        if not name:
            what = type(self.part(part)).__name__ if self.path(part) else type(self.module).__name__
            raise InputError(
                f"block {self.index}: its {'FFN' if part == 'ffn' else part} is a {what}, not a row of matrices; "
                "accepted: drop, and prune of single weights"
            )
        return Matrix(operator.attrgetter(name)(self.part(part)))

    def path(self, part: str) -> str:
        """Return the path of its ``attention`` or ``ffn`` from the block; empty where that is the block itself."""
        return self.family.ffn if part == "ffn" else self.mixer

    def part(self, part: str) -> nn.Module:
        """Return what computes its ``attention`` or ``ffn``; the block where that is no module of its own."""
        path = self.path(part)
        module: nn.Module = operator.attrgetter(path)(self.module) if path else self.module
        return module

    def remove_(self, part: str) -> None:
        """Remove its ``attention`` or ``ffn``, with the norms that only that part has."""
        family = self.family
        if part == "attention":
            self.module.set_submodule(self.mixer, AbsentAttention(self.index) if self.attends else Absent())
        elif family.ffn:
            self.module.set_submodule(family.ffn, Absent())
        else:
            self.module.set_submodule(family.up, nn.Identity())
            self.module.set_submodule(family.down, Absent())
        for name in family.norms(part):
            self.module.set_submodule(name, nn.Identity())

    def removed_paths(self, part: str) -> list[str]:
        """Return the paths, from the block, of what goes with its ``attention`` or ``ffn``."""
        family = self.family
        there = [self.path(part)] if self.path(part) else [family.up, family.down]
        return [*there, *family.norms(part)]

    def renumber_(self, index: int, *, by_place: bool) -> None:
        """Tell its modules their new place, which the cache goes by.

        Args:
            by_place: whether an attention's scale is 1 / (index + 1) of the place where its block is built, as in some
                GPT-2s.
        """
        module: Any
        for module in self.module.modules():
            name = "layer_idx" if hasattr(module, "layer_idx") else "layer_id"
            old = getattr(module, name, None)
            if old is None or old == index:
                continue
            setattr(module, name, index)
            if by_place and hasattr(module, "c_attn"):
                # Take the new place's scale, as a reload will, and keep what the block computes by folding the quotient
                # into the queries.
                fused = Matrix(module.c_attn)
                fused.own_()  # another decoder may use these parameters, at the old place
                for tensor in fused.tensors:
                    tensor[: len(tensor) // 3] *= (index + 1) / (old + 1)
                module.scaling = module.scaling * (old + 1) / (index + 1)


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


class Attention:
    """A block's attention as groups of heads.

    A *group* is one head of keys and values with the query heads that read it; where every query head has its own
    keys and values, each head is a group. Where heads can only go together, all of them are one: see `joined`.

    Args:
        queries: number of query heads of a group.
    """

    def __init__(self, module: nn.Module, family: Family, queries: int) -> None:
        self.module: Any = module
        self._family, self._queries = family, queries
        self.inputs = [Matrix(operator.attrgetter(name)(module)) for name in family.attention_inputs]
        self.output = Matrix(operator.attrgetter(family.attention_output)(module))

    @property
    def d_head(self) -> int:
        """How many channels a head has."""
        holder, _ = _holder(self.module, self._family.attention_output)
        known = getattr(holder, "head_dim", None) or getattr(holder, "head_size", None)
        return int(known or self.output.inputs // self._queries)

    @property
    def channels(self) -> int:
        """How many of the channels that the output matrix reads are a group's."""
        return self.d_head * self._queries

    @property
    def heads(self) -> int:
        """The number of groups."""
        return self.output.weight.shape[1] // self.channels

    @property
    def units(self) -> list[Tensor]:
        """All that goes with a group of heads, each (groups, parameters): the group comes first."""
        groups = torch.arange(self.heads, device=self.output.weight.device)
        made = [
            tensor[self.rows(groups, place)].reshape(self.heads, -1)
            for place, matrix in enumerate(self.inputs)
            for tensor in matrix.tensors
        ]
        return [*made, self.output.weight.T.reshape(self.heads, -1)]

    def rows(self, groups: Tensor, place: int = 0) -> Tensor:
        """Return which outputs of one of the input matrices belong to some groups, (groups, rows of each) indices.

        Args:
            place: the matrix's, among the inputs.
        """
        return rows_of(groups, self.heads, self.widths(place))

    def joined(self) -> str:
        """Say why heads can only go together; nothing where they need not."""
        if self._family.slopes:
            return "the slope of a head follows from its number (ALiBi)"
        own = {id(matrix.module) for matrix in (*self.inputs, self.output)}
        for name, module in self.module.named_modules():
            if isinstance(module, nn.ModuleList):
                return f"{name} has a part for each head"
            for each in module.parameters(recurse=False):
                if id(module) not in own and each.numel() != self.d_head:
                    return f"{name} spans all heads"
        return ""

    def widths(self, place: int = 0) -> list[int]:
        """Return how many outputs of an input matrix a group has, run by run: see `rows_of`."""
        whole = self.inputs[place].weight.shape[0] // self.heads
        stacked = [self.channels, self.d_head, self.d_head]
        return stacked if self._family.layout == "stacked" and sum(stacked) == whole else [whole]

    def keep_(self, groups: Tensor) -> None:
        """Keep only these groups, (kept,) indices; the parameters are new ones where any goes."""
        if torch.equal(groups, torch.arange(self.heads, device=groups.device)):
            return
        for place, matrix in enumerate(self.inputs):
            rows = self.rows(groups, place)
            parts = rows.split(self.widths(place), dim=1)
            matrix.keep_(outputs=torch.cat([part.flatten() for part in parts]))
        self.output.keep_(inputs=rows_of(groups, self.heads, [self.channels]).flatten())
        counts = {
            "groups": len(groups),
            "queries": len(groups) * self._queries,
            "channels": len(groups) * self.channels,
        }
        for name, which in self._family.counts:
            holder, last = _holder(self.module, name)
            if not isinstance(holder, nn.Module):  # the model's configuration, which other attentions read too
                self.module.config = holder = copy.copy(holder)
            setattr(holder, last, counts[which])


def _holder(module: nn.Module, path: str) -> tuple[Any, str]:
    """Return what holds an attribute, by its path from a module, and the attribute's own name."""
    before, _, name = path.rpartition(".")
    return operator.attrgetter(before)(module) if before else module, name


def rows_of(groups: Tensor, of: int, widths: Sequence[int]) -> Tensor:
    """Return which rows belong to some groups, where each run of rows holds all groups, one after the other.

    Args:
        groups: (groups,) indices.
        of: how many groups there are.
        widths: of each run, how many rows a group has.

    Returns:
        (groups, sum of the widths) indices.
    """
    found, start = [], 0
    for width in widths:
        found.append(start + groups[:, None] * width + torch.arange(width, device=groups.device))
        start += of * width
    return torch.cat(found, dim=1)


class AbsentAttention(nn.Module):
    """Adds zero to the residual stream, and counts the tokens that it sees in the cache.

    Attributes:
        layer_idx: the block's index, by the name that transformers gives it.
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None, **others: Any) -> tuple[Tensor, None]:
        """Return zeros, or the residual stream where that is to be added, and no attention weights."""
        cache = others.get("past_key_values", others.get("layer_past"))
        if cache is not None:
            # Positions and masks follow from the length of what is cached, and nothing cached counts as no length.
            batch, tokens, _width = hidden_states.shape
            one_channel = hidden_states.new_zeros(batch, 1, tokens, 1)
            cache.update(one_channel, one_channel, self.layer_idx)
        return torch.zeros_like(hidden_states) if residual is None else residual, None


class Absent(nn.Module):
    """Adds zero to the residual stream, in the place of an FFN."""

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None, **_: Any) -> Tensor:
        """Return zeros, or the residual stream where that is to be added."""
        return torch.zeros_like(hidden_states) if residual is None else residual
