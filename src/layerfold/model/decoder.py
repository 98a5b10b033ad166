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
from layerfold.model.families import FAMILIES, Family, family_of
from layerfold.model.matrix import Matrix, is_matrix
from layerfold.model.offload import ahead, is_offloaded, resident

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_BY_BLOCK = ("layer_types", "block_types", "mlp_layer_types", "no_rope_layers", "attention_layers")
"""What a configuration says of each block."""


def known_family(model: PreTrainedModel) -> Family:
    """Return where a model's parts are: by its architecture's row, or inferred once, and remembered on the model."""
    if model.config.model_type in FAMILIES or not model.__class__.__name__.endswith("ForCausalLM"):
        return family_of(model.config)
    found: Family | None = getattr(model, _INFERRED, None)
    if found is None:
        from layerfold.model.inferring import inferred

        found = inferred(model)
        setattr(model, _INFERRED, found)
    return found


_INFERRED = "_layerfold_family"


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
        model: a transformers causal LM of one of the architectures in `families`, or of another, which is inferred.
        family: where its parts are; None finds out.

    Raises:
        ModelError: the architecture is not supported, and cannot be inferred.
    """

    def __init__(self, model: PreTrainedModel, family: Family | None = None) -> None:
        self.family = family or known_family(model)
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
        queries = self.query_heads // self.configured_heads
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
    def configured_heads(self) -> int:
        """The number of groups of heads that the configuration says all attentions have: see `Attention`."""
        family = self.family
        groups = int((getattr(self.model.config, family.groups, None) if family.groups else None) or self.query_heads)
        return 1 if family.one_group or (groups > 1 and self.joined_heads) else groups

    @property
    def query_heads(self) -> int:
        """The number of query heads that the configuration says all attentions have."""
        return int(getattr(self.model.config, "num_attention_heads", None) or 1)

    @property
    def joined_heads(self) -> str:
        """Say why heads can only go together; nothing where they need not."""
        blocks = (Block(index, module, self.family, self.query_heads) for index, module in enumerate(self._modules))
        there = (block for block in blocks if block.attends and not block.gone("attention"))
        first = next(there, None)
        return "" if first is None else first.attention.joined()

    @property
    def configured_d_ffn(self) -> int:
        """The number of neurons that the configuration says all FFNs have."""
        said = getattr(self.model.config, self.family.d_ffn, None) if self.family.d_ffn else None
        return int(said or 4 * self.d_model)

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
        self._tell_heads()

    def _tell_heads(self) -> None:
        """Write into the configuration how many heads all attentions have, where they agree and it can say so."""
        left = {heads for heads in self.heads if heads}
        if len(left) == 1 and left != {self.configured_heads} and self.says_heads(*left):
            self._say_heads_(self.model.config, *left)

    def says_heads(self, groups: int) -> bool:
        """Whether the configuration can say that all attentions have so many groups of heads, of the same size.

        It cannot where it divides the model's width by the number of heads.
        """
        config = copy.deepcopy(self.model.config)
        self._say_heads_(config, groups)
        try:
            with torch.device("meta"):  # for the shapes alone
                outline = Decoder(type(self.model)(config), self.family)
        except Exception:  # of the architecture's own code, for a configuration that it does not admit
            return False
        mine, theirs = (each._first_attention() for each in (self, outline))
        return mine is None or theirs is None or theirs.output.inputs == groups * mine.channels

    def _say_heads_(self, config: Any, groups: int) -> None:
        attention, queries = self._first_attention(), self.query_heads // self.configured_heads
        if attention is not None and (hasattr(config, "head_dim") or self.family.groups):
            config.head_dim = attention.d_head
        config.num_attention_heads = groups * queries
        if self.family.groups and getattr(config, self.family.groups, None) is not None:
            setattr(config, self.family.groups, groups)

    def _first_attention(self) -> Attention | None:
        return next((block.attention for block in self.blocks if block.heads), None)

    def _tell_width(self) -> None:
        """Write into the configuration, which holds one number for all blocks, the largest there is."""
        widest = max(self.d_ffn)
        if widest and self.family.d_ffn and widest != self.configured_d_ffn:
            setattr(self.model.config, self.family.d_ffn, widest)

    @property
    def norm(self) -> nn.Module:
        """What stands between the last block and the LM head: the last norm, and a projection in some models."""
        found = [_submodule(self.model, path) for path in self.family.readout]
        there = [each for each in found if each is not None]
        return there[0] if len(there) == 1 else nn.Sequential(*there)

    @property
    def logit_scale(self) -> float:
        """What the LM head's products are multiplied by."""
        config, family = self.model.config, self.family
        scale = float(getattr(config, family.logit_scale)) if family.logit_scale else 1.0
        return scale / float(getattr(config, family.logit_divisor)) if family.logit_divisor else scale

    @property
    def logit_cap(self) -> float | None:
        """The cap c of logits, z -> c tanh(z / c); None where there is none."""
        cap = getattr(self.model.config, self.family.logit_cap, None) if self.family.logit_cap else None
        return None if cap is None else float(cap)

    @property
    def residual_scale(self) -> float:
        """What an attention's or FFN's output is multiplied by before it is added to the residual stream."""
        name = self.family.residual
        return float(getattr(self.model.config, name)) if name else 1.0

    def readout(self, hidden: Tensor) -> Tensor:
        """Return what the LM head's rows multiply, (..., d_head), for what leaves the last block, (..., d_model)."""
        return self.scaled(self.norm(hidden))

    def scaled(self, final: Tensor) -> Tensor:
        """Multiply what leaves the last norm by the scale of the logits."""
        scale = self.logit_scale
        return final if scale == 1 else final * scale

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
        config = self.model.config
        names = ("max_position_embeddings", "max_seq_len", "seq_length")  # MPT's and, of old, Bloom's
        return int(next((said for name in names if (said := getattr(config, name, None))), defaults.CONTEXT))

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
        config = self.model.config
        modules = self._modules
        for new, old in enumerate(kept):
            self._renumber(modules[old], new)
        path, _, name = self.family.blocks.rpartition(".")
        setattr(operator.attrgetter(path)(self.model), name, nn.ModuleList([modules[i] for i in kept]))
        depth = len(modules)
        setattr(config, self.family.depth, len(kept))
        for name in _BY_BLOCK:
            if isinstance(said := getattr(config, name, None), list | tuple) and len(said) == depth:
                setattr(config, name, [said[i] for i in kept])
        if getattr(config, "attention_types", None) is not None:  # GPT-Neo's: runs of kinds, with their repetitions
            config.attention_types = [[[kind], 1] for kind in config.attention_layers]
        self._tell_width()

    def _renumber(self, block: nn.Module, index: int) -> None:
        """Tell a block's modules their new place; the cache and, in some GPT-2s, the attention's scale depend on it."""
        module: Any
        for module in block.modules():
            name = "layer_idx" if hasattr(module, "layer_idx") else "layer_id"
            old = getattr(module, name, None)
            if old is None or old == index:
                continue
            setattr(module, name, index)
            if getattr(self.model.config, "scale_attn_by_inverse_layer_idx", False) and hasattr(module, "c_attn"):
                # The scale is 1 / (index + 1) of the place where a block is built: take the new place's, as a reload
                # will, and keep what the block computes by folding the quotient into the queries.
                fused = Matrix(module.c_attn)
                fused.own_()  # another decoder may use these parameters, at the old place
                for tensor in fused.tensors:
                    tensor[: len(tensor) // 3] *= (index + 1) / (old + 1)
                module.scaling = module.scaling * (old + 1) / (index + 1)

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
