"""A uniform live view of a causal language model, and the edits on it."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from layerfold import defaults
from layerfold.environment import device_name
from layerfold.errors import InputError, ModelError, one_of
from layerfold.memory.mapped import is_mapped, mapped
from layerfold.model.block import PARTS, Attention, Block, Projection
from layerfold.model.configured import Configured
from layerfold.model.families import Family, family_of
from layerfold.model.matrix import Matrix, is_matrix
from layerfold.model.offload import ahead, is_offloaded, resident

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    found: nn.Module | None = model
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


@dataclass(frozen=True)
class Size:
    """Counts over distinct tensors: a tied tensor counts once."""

    parameters: int
    nonzero: int


class Decoder:
    """A live view of a causal language model as a sequence of blocks.

    Args:
        model: a transformers causal LM of one of the architectures in `families`.
        family: where its parts are; None takes the model's own row, or its architecture's.

    Raises:
        ModelError: the architecture has no row.
    """

    def __init__(self, model: PreTrainedModel, family: Family | None = None) -> None:
        self.family = family or family_of(model)
        if not model.__class__.__name__.endswith(("ForCausalLM", "LMHeadModel")):
            raise ModelError(f"not a causal language model: {model.__class__.__name__}")
        self.model: Any = model
        self._joined: str | None = None

    @property
    def _modules(self) -> nn.ModuleList:
        modules: nn.ModuleList = operator.attrgetter(self.family.blocks)(self.model)
        return modules

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks, first to last."""
        queries = self.configured.query_heads // self.configured_heads
        return tuple(Block(i, module, self.family, queries) for i, module in enumerate(self._modules))

    @property
    def projections(self) -> Iterator[Projection]:
        """The matrices of all blocks' attention and FFNs, in the order in which blocks use them."""
        for block in self.blocks:
            prefix = f"{self.family.blocks}.{block.index}"
            attention = f"{prefix}.{block.path('attention')}."
            for name, module in block.module.named_modules(prefix=prefix):
                if is_matrix(module):
                    part = "attention" if name.startswith(attention) else "ffn"
                    yield Projection(f"{name}.weight", block.index, part, Matrix(module))

    @property
    def d_ffn(self) -> tuple[int, ...]:
        """The number of neurons of each block's FFN; 0 where it was dropped."""
        return tuple(block.d_ffn for block in self.blocks)

    @property
    def blocks_by_ffn(self) -> list[tuple[int, ...]]:
        """For each distinct FFN, by its first block, the indices of the blocks that have it: several where it is tied.

        Where blocks share an FFN with low-rank deltas, each has its own.
        """
        found: dict[int, tuple[int, ...]] = {}
        for block in self.blocks:
            if block.d_ffn and (down := block.output("ffn")) is not None:
                found[down.key] = (*found.get(down.key, ()), block.index)
        return list(found.values())

    def keep_neurons_(self, kept: Mapping[int, Tensor]) -> None:
        """Keep only these neurons of some blocks' FFNs, each (kept,) indices; FFNs that are one stay one.

        Raises:
            InputError: what is no block, or no neuron of it, or given twice; a block without FFN, no neuron at all, or
                FFNs that are one and would keep different ones.
        """
        if not kept:
            return
        if not kept.keys() <= set(range(self.n_blocks)):
            raise InputError(f"blocks to keep neurons of: {list(kept)}; accepted: 0 ... {self.n_blocks - 1}")
        for index, neurons in kept.items():
            d_ffn = self.blocks[index].ffn.d_ffn
            if not set(neurons.tolist()) <= set(range(d_ffn)) or len(neurons.unique()) < len(neurons):
                raise InputError(f"neurons to keep of block {index}; accepted: distinct indices in 0 ... {d_ffn - 1}")
        tied = {index: blocks[0] for blocks in self.blocks_by_ffn for index in blocks}
        for index, owner in sorted(tied.items()):
            mine, theirs = kept.get(index), kept.get(owner)
            if mine is not None and not len(mine):
                raise InputError(f"block {index} would keep no neuron; accepted: at least 1")
            if (mine is None) != (theirs is None) or (mine is not None and not torch.equal(mine, cast(Tensor, theirs))):
                raise InputError(f"blocks {owner} and {index} share an FFN, and would keep different neurons")
        ffns = {index: self.blocks[index].ffn for index in kept}
        for index, neurons in sorted(kept.items()):  # the owner of those that are one comes first
            ffns[index].keep_(neurons)
            if tied[index] != index:
                ffns[index].tie_(ffns[tied[index]])
        self._tell_width()

    @property
    def heads(self) -> tuple[int, ...]:
        """The number of each block's groups of heads, see `Attention`; 0 where its attention was dropped."""
        return tuple(block.heads for block in self.blocks)

    @property
    def configured(self) -> Configured:
        """What its configuration says."""
        return Configured(self.model.config, self.family)

    @property
    def configured_heads(self) -> int:
        """The number of groups of heads that the configuration says all attentions have: see `Attention`."""
        groups = self.configured.groups
        return 1 if groups > 1 and self.joined_heads else groups

    @property
    def joined_heads(self) -> str:
        """Say why heads can only go together; nothing where they need not."""
        if self._joined is None:  # no edit changes it
            queries = self.configured.query_heads
            blocks = (Block(index, module, self.family, queries) for index, module in enumerate(self._modules))
            there = (block for block in blocks if block.attends and not block.gone("attention"))
            first = next(there, None)
            self._joined = None if first is None else first.attention.joined()
        return self._joined or ""

    def keep_heads_(self, kept: Mapping[int, Tensor]) -> None:
        """Keep only these groups of heads of some blocks' attentions, each (kept,) indices.

        Raises:
            InputError: what is no block, or no group of it, or given twice; a block without attention, or no group.
        """
        if not kept.keys() <= set(range(self.n_blocks)):
            raise InputError(f"blocks to keep heads of: {list(kept)}; accepted: 0 ... {self.n_blocks - 1}")
        attentions = {index: self.blocks[index].attention for index in kept}
        for index, groups in kept.items():
            heads = attentions[index].heads
            if not len(groups) or not set(groups.tolist()) <= set(range(heads)) or len(groups.unique()) < len(groups):
                raise InputError(f"heads to keep of block {index}; accepted: distinct indices in 0 ... {heads - 1}")
        for index, groups in kept.items():
            attentions[index].keep_(groups)

    def tell_heads_(self) -> None:
        """Write into the configuration how many heads all attentions have, where they agree and it can say so.

        A dense checkpoint then has no zeros in the place of the others.
        """
        left = {heads for heads in self.heads if heads}
        if len(left) == 1 and left != {self.configured_heads} and self.says_heads(*left):
            self._say_heads_(self.configured, *left)

    def says_heads(self, groups: int) -> bool:
        """Whether the configuration can say that all attentions have so many groups of heads, of the same size.

        It cannot where it divides the model's width by the number of heads.
        """
        config = copy.deepcopy(self.model.config)
        try:
            self._say_heads_(Configured(config, self.family), groups)
            with torch.device("meta"):  # for the shapes alone
                outline = Decoder(type(self.model)(config), self.family)
        except Exception:  # of the architecture's own code, for a configuration that it does not admit
            return False
        mine, theirs = (each._first_attention() for each in (self, outline))
        return mine is None or theirs is None or theirs.output.inputs == groups * mine.channels

    def _say_heads_(self, configured: Configured, groups: int) -> None:
        if (attention := self._first_attention()) is not None:
            configured.say_heads_(groups, self.configured.query_heads // self.configured_heads, attention.d_head)

    def _first_attention(self) -> Attention | None:
        return next((block.attention for block in self.blocks if block.heads), None)

    def _tell_width(self) -> None:
        """Write into the configuration, which holds one number for all blocks, the largest there is."""
        self.configured.say_width_(max(self.d_ffn))

    @property
    def norm(self) -> nn.Module:
        """What stands between the last block and the LM head: the last norm, and a projection in some models."""
        found = [_submodule(self.model, path) for path in self.family.readout]
        there = [each for each in found if each is not None]
        return there[0] if len(there) == 1 else nn.Sequential(*there)

    def readout(self, hidden: Tensor) -> Tensor:
        """Return what the LM head's rows multiply, (..., d_head), for what leaves the last block, (..., d_model)."""
        return self.scaled(self.norm(hidden))

    def scaled(self, final: Tensor) -> Tensor:
        """Multiply what leaves the last norm by the scale of the logits."""
        scale = self.configured.logit_scale
        return final if scale == 1 else final * scale

    @property
    def n_blocks(self) -> int:
        """The depth."""
        return len(self._modules)

    @property
    def d_model(self) -> int:
        """The width of the residual stream."""
        return self.configured.d_model

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Type of its weights, and of what enters and leaves its blocks."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def offloaded(self) -> bool:
        """Whether its blocks' weights wait in files, or elsewhere than on the device: see `offload`."""
        return any(is_offloaded(block) or any(map(is_mapped, block.parameters())) for block in self._modules)

    def resident(self, indices: Iterable[int], *, edited: bool = False) -> AbstractContextManager[None]:
        """Keep the weights of some blocks on the device; does nothing for blocks that are not offloaded.

        Args:
            edited: whether something writes into them, or replaces them.
        """
        modules = self._modules
        return resident([modules[index] for index in sorted(set(indices))], edited=edited)

    def ahead(self, index: int) -> None:
        """Begin to copy a block's weights to the device, where they wait elsewhere and there is such a block."""
        if index < self.n_blocks:
            ahead(self._modules[index])

    @property
    def computed(self) -> dict[str, str]:
        """Where and in which dtype it computes, for records; nothing for float32 on the processor."""
        device, dtype = self.device, str(self.dtype).removeprefix("torch.")
        if device.type == "cpu" and dtype == "float32":
            return {}
        return {"device": device_name(device), "dtype": dtype}

    @property
    def context(self) -> int:
        """The largest number of positions."""
        return self.configured.context

    @property
    def default_context(self) -> int:
        """The window that text is cut into where none is named."""
        return min(self.context, defaults.CONTEXT)

    def check_ids(self, ids: Tensor) -> None:
        """Raise InputError for a token id outside the vocabulary."""
        vocabulary = int(self.model.config.vocab_size)
        if ids.numel() and int(ids.max()) >= vocabulary:
            raise InputError(f"token id {int(ids.max())} for a vocabulary of {vocabulary}: the wrong tokenizer?")

    def keep_(self, indices: Sequence[int]) -> None:
        """Keep only the blocks at these indices, in increasing order, and renumber everything that counts them.

        Raises:
            InputError: an index that is not a block, a repeated one, or none at all.
        """
        kept = list(indices)
        if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= self.n_blocks:
            raise InputError(
                f"blocks to keep: {kept}; accepted: distinct indices in 0 ... {self.n_blocks - 1}, in order"
            )
        blocks = self.blocks
        if self.family.mixers and not any(blocks[index].attends for index in kept):
            raise InputError(
                f"blocks to keep: {kept}, none of which has an attention; accepted: at least one that has: the cache "
                f"of a {self.model.config.model_type} counts tokens there"
            )
        modules = self._modules
        by_place = bool(getattr(self.model.config, "scale_attn_by_inverse_layer_idx", False))
        for new, old in enumerate(kept):
            blocks[old].renumber_(new, by_place=by_place)
        path, _, name = self.family.blocks.rpartition(".")
        setattr(operator.attrgetter(path)(self.model), name, nn.ModuleList([modules[i] for i in kept]))
        self.configured.keep_(kept, len(modules))
        self._tell_width()

    @property
    def removed_parts(self) -> dict[str, tuple[int, ...]]:
        """The indices of the blocks that have no attention, under ``attention``, and of those that have no FFN."""
        return {part: tuple(block.index for block in self.blocks if block.gone(part)) for part in PARTS}

    @property
    def removed_prefixes(self) -> tuple[str, ...]:
        """What the names of the tensors that are gone with the removed parts would begin with."""
        blocks = self.blocks
        gone = ((part, index) for part, indices in self.removed_parts.items() for index in indices)
        return tuple(
            f"{self.family.blocks}.{index}.{path}."
            for part, index in gone
            for path in blocks[index].removed_paths(part)
        )

    def remove_(self, part: str, indices: Sequence[int]) -> None:
        """Remove the ``attention`` or the ``ffn`` of some blocks, with the norms that only that part has.

        Raises:
            InputError: no such part, an index that is not a block, a repeated one, or a part that is gone already.
        """
        if part not in PARTS:
            raise InputError(f"unknown part {one_of(part, PARTS)}")
        chosen = list(indices)
        if len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(self.n_blocks)):
            raise InputError(
                f"blocks to remove the {part} of: {chosen}; accepted: distinct indices in 0 ... {self.n_blocks - 1}"
            )
        family, named = self.family, "FFN" if part == "ffn" else part
        if chosen and not (family.attention if part == "attention" else family.ffn or family.down):
            raise InputError(
                f"blocks of a {self.model.config.model_type} have no {named} of their own; accepted: block"
            )
        for index in chosen:
            if self.blocks[index].gone(part):
                raise InputError(f"block {index} has no {'FFN' if part == 'ffn' else part}: it was dropped")
        for index in chosen:
            self.blocks[index].remove_(part)
        self._tell_width()

    def copy(self, *, share: bool = False) -> Decoder:
        """Return a copy that can be edited while this one stays; tensors tied here are tied there, mapped ones mapped.

        Args:
            share: let it use the same parameters, so that it needs no memory of its own: what changes its structure
                leaves this decoder alone, what writes into its weights does not.
        """
        known: dict[int, Tensor] = {}
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if share:
                known[id(tensor)] = tensor
            elif is_mapped(tensor):
                new = mapped(tensor)
                known[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
        return Decoder(copy.deepcopy(self.model, known), self.family)

    def size(self) -> Size:
        """Count distinct and non-zero parameters."""
        tensors = list(self.model.parameters())  # distinct: torch yields a shared parameter once
        return Size(
            parameters=sum(tensor.numel() for tensor in tensors),
            nonzero=sum(int(torch.count_nonzero(tensor)) for tensor in tensors),
        )

    def check_finite(self) -> None:
        """Raise ModelError naming the first tensor that holds a NaN or an infinity."""
        for name, tensor in self.model.named_parameters():
            # A sum is finite only if all terms are, but may overflow: look closer only where it is not.
            if not torch.isfinite(tensor.detach().sum()) and not torch.isfinite(tensor).all():
                bad = int((~torch.isfinite(tensor)).sum())
                raise ModelError(f"tensor {name!r} holds {bad:,} values that are not finite, of {tensor.numel():,}")


def check_precision(decoder: Decoder) -> None:
    """Raise InputError for weights of several dtypes, between which activations cannot pass."""
    first = None
    for name, weight in decoder.model.named_parameters():
        first = first or (name, weight.dtype)
        if weight.dtype != first[1]:
            one, two = (f"{each!r} is {dtype}".replace("torch.", "") for each, dtype in (first, (name, weight.dtype)))
            raise InputError(f"{one} and {two}; accepted: one dtype, as model.decoder.model.to(dtype) gives")
