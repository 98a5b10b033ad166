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
from layerfold.model.block import FUSED, PARTS, AbsentAttention, AbsentFFN, Block, Projection
from layerfold.model.families import family_of
from layerfold.model.matrix import Matrix, is_matrix
from layerfold.model.offload import ahead, is_offloaded, resident

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Size:
    """Counts over distinct tensors: a tied tensor counts once."""

    parameters: int
    nonzero: int


class Decoder:
    """A live view of a causal language model as a sequence of blocks.

    Args:
        model: a transformers causal LM of one of the architectures in `families`.

    Raises:
        ModelError: the architecture is not supported.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.family = family_of(model.config.model_type)
        if not model.__class__.__name__.endswith(("ForCausalLM", "LMHeadModel")):
            raise ModelError(f"not a causal language model: {model.__class__.__name__}")
        self.model: Any = model

    @property
    def _modules(self) -> nn.ModuleList:
        modules: nn.ModuleList = operator.attrgetter(self.family.blocks)(self.model)
        return modules

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks, first to last."""
        return tuple(Block(i, module, self.family) for i, module in enumerate(self._modules))

    @property
    def projections(self) -> Iterator[Projection]:
        """The matrices of all blocks' attention and FFNs, in the order in which blocks use them."""
        for index in range(self.n_blocks):
            for part in PARTS:
                path, _ = self._paths(part, index)
                for name, module in self.model.get_submodule(path).named_modules(prefix=path):
                    if is_matrix(module):
                        yield Projection(f"{name}.weight", index, part, Matrix(module))

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
            if (down := block.output("ffn")) is not None:
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

    def _tell_width(self) -> None:
        """Write into the configuration, which holds one number for all blocks, the largest there is."""
        config, widest = self.model.config, max(self.d_ffn)
        if widest and widest != (getattr(config, self.family.d_ffn) or 4 * self.d_model):  # what no number stands for
            setattr(config, self.family.d_ffn, widest)

    @property
    def norm(self) -> nn.Module:
        """The norm after the last block, before the LM head."""
        norm: nn.Module = operator.attrgetter(self.family.norm)(self.model)
        return norm

    @property
    def n_blocks(self) -> int:
        """The depth."""
        return len(self._modules)

    @property
    def d_model(self) -> int:
        """The width of the residual stream."""
        return int(self.model.config.hidden_size)

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
        return int(self.model.config.max_position_embeddings)

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
        config = self.model.config
        modules = self._modules
        for new, old in enumerate(kept):
            self._renumber(modules[old], new)
        path, _, name = self.family.blocks.rpartition(".")
        setattr(operator.attrgetter(path)(self.model), name, nn.ModuleList([modules[i] for i in kept]))
        setattr(config, self.family.depth, len(kept))
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = [config.layer_types[i] for i in kept]
        self._tell_width()

    def _renumber(self, block: nn.Module, index: int) -> None:
        """Tell a block's modules their new place; the cache and, in some GPT-2s, the attention's scale depend on it."""
        module: Any
        for module in block.modules():
            old = getattr(module, "layer_idx", None)
            if old is None or old == index:
                continue
            module.layer_idx = index
            if getattr(self.model.config, "scale_attn_by_inverse_layer_idx", False) and hasattr(module, "c_attn"):
                # The scale is 1 / (index + 1) of the place where a block is built: take the new place's, as a reload
                # will, and keep what the block computes by folding the quotient into the queries.
                fused = Matrix(module.c_attn)
                fused.own_()  # another decoder may use these parameters, at the old place
                for tensor in fused.tensors:
                    tensor[: len(tensor) // FUSED] *= (index + 1) / (old + 1)
                module.scaling = module.scaling * (old + 1) / (index + 1)

    @property
    def removed_parts(self) -> dict[str, tuple[int, ...]]:
        """The indices of the blocks that have no attention, under ``attention``, and of those that have no FFN."""
        return {part: tuple(block.index for block in self.blocks if block.output(part) is None) for part in PARTS}

    @property
    def removed_prefixes(self) -> tuple[str, ...]:
        """What the names of the tensors that are gone with the removed parts would begin with."""
        gone = ((part, index) for part, indices in self.removed_parts.items() for index in indices)
        return tuple(f"{path}." for part, index in gone for path in self._paths(part, index))

    def _paths(self, part: str, index: int) -> tuple[str, str]:
        """Paths from the causal LM to a part of a block and to the norm before it."""
        family = self.family
        names = (family.ffn, family.ffn_norm) if part == "ffn" else (family.attention, family.attention_norm)
        return f"{family.blocks}.{index}.{names[0]}", f"{family.blocks}.{index}.{names[1]}"

    def remove_(self, part: str, indices: Sequence[int]) -> None:
        """Remove the ``attention`` or the ``ffn`` of some blocks, with the norm before it.

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
        for index in chosen:
            if self.blocks[index].output(part) is None:
                raise InputError(f"block {index} has no {'FFN' if part == 'ffn' else part}: it was dropped")
        for index in chosen:
            sublayer, norm = self._paths(part, index)
            self.model.set_submodule(sublayer, AbsentFFN() if part == "ffn" else AbsentAttention(index))
            self.model.set_submodule(norm, nn.Identity())
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
        return Decoder(copy.deepcopy(self.model, known))

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
