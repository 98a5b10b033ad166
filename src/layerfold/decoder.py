"""A uniform live view of a causal language model, and the edits on it.

Nothing here copies weights: a `Matrix` reads and writes the model's own parameters, always in (out, in) orientation,
so that no method needs to know that GPT-2's `Conv1D` stores the transpose.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layerfold import defaults
from layerfold.errors import InputError, ModelError
from layerfold.families import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Matrix:
    """A live view of one affine map, whatever stores it (`nn.Linear`, `Conv1D`)."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._transposed = type(module).__name__ == "Conv1D"

    @property
    def weight(self) -> Tensor:
        """(out, in); writing into it changes the model."""
        weight: Tensor = self.module.weight.detach()  # type: ignore[operator]
        return weight.T if self._transposed else weight

    @property
    def bias(self) -> Tensor | None:
        """(out,), or None; writing into it changes the model."""
        bias = self.module.bias
        return None if bias is None else bias.detach()  # type: ignore[operator]

    def tie_(self, other: Matrix) -> None:
        """Use the other matrix's parameters from now on."""
        self.module.weight = other.module.weight
        self.module.bias = other.module.bias

    def own_(self) -> None:
        """Use parameters of its own from now on, with the values they have."""
        for name, parameter in list(self.module.named_parameters(recurse=False)):
            setattr(self.module, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))


class FFN:
    """A block's feed-forward part: down(act(up x)), or down(act(gate x) * up x) where it is gated.

    A *neuron* is one of the `d_ffn` inputs of `down`.
    """

    def __init__(self, module: nn.Module, up: Matrix, gate: Matrix | None, down: Matrix) -> None:
        self.module = module
        self.up, self.gate, self.down = up, gate, down

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """`up`, `gate` where there is one, `down`."""
        return (self.up, self.down) if self.gate is None else (self.up, self.gate, self.down)

    @property
    def d_ffn(self) -> int:
        """The number of neurons."""
        return self.down.weight.shape[1]

    def tensors(self, order: Tensor | None = None) -> list[Tensor]:
        """All weights and biases in a fixed order: live, or copied with the neurons reordered by `order`, (d_ffn,)."""
        found: list[Tensor] = []
        for matrix in self.matrices:
            weight, bias = matrix.weight, matrix.bias
            if order is not None and matrix is self.down:
                weight = weight[:, order]
            elif order is not None:
                weight, bias = weight[order], None if bias is None else bias[order]
            found += [weight] if bias is None else [weight, bias]
        return found

    def copy_(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite all weights and biases, given in the order of `tensors`."""
        for target, source in zip(self.tensors(), tensors, strict=True):
            target.copy_(source)

    def permute_(self, order: Tensor) -> None:
        """Reorder the neurons; neuron i becomes the old neuron order[i]. Changes no output."""
        self.copy_(self.tensors(order))

    def tie_(self, other: FFN) -> None:
        """Use the other FFN's parameters from now on."""
        for mine, theirs in zip(self.matrices, other.matrices, strict=True):
            mine.tie_(theirs)

    def own_(self) -> None:
        """Use parameters of its own from now on, with the values they have."""
        for matrix in self.matrices:
            matrix.own_()

    @torch.no_grad()
    def neurons(self, inputs: Tensor) -> Tensor:
        """Compute the neurons' activations, (..., d_ffn), from the FFN's inputs, (..., d_model)."""
        captured: list[Tensor] = []

        def stop(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            captured.append(arguments[0])
            raise _Stop

        handle = self.down.module.register_forward_pre_hook(stop)
        try:
            self.module(inputs)
        except _Stop:
            pass
        finally:
            handle.remove()
        return captured[0]


class _Stop(Exception):
    """Ends a forward pass once what was wanted has been seen."""


@dataclass(frozen=True)
class Block:
    """One transformer layer."""

    index: int
    module: nn.Module
    ffn: FFN


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
        return tuple(Block(i, module, self._ffn(module)) for i, module in enumerate(self._modules))

    def _ffn(self, block: nn.Module) -> FFN:
        ffn: nn.Module = operator.attrgetter(self.family.ffn)(block)

        def matrix(name: str) -> Matrix:
            return Matrix(operator.attrgetter(name)(ffn))

        gate = None if self.family.gate is None else matrix(self.family.gate)
        return FFN(ffn, matrix(self.family.up), gate, matrix(self.family.down))

    @property
    def n_blocks(self) -> int:
        """The depth."""
        return len(self._modules)

    @property
    def d_model(self) -> int:
        """The width of the residual stream."""
        return int(self.model.config.hidden_size)

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
                fused = module.c_attn
                with torch.no_grad():
                    fused.weight[:, : self.d_model] *= (index + 1) / (old + 1)
                    fused.bias[: self.d_model] *= (index + 1) / (old + 1)
                module.scaling = module.scaling * (old + 1) / (index + 1)

    def copy(self) -> Decoder:
        """Return an independent copy; tensors tied here are tied there."""
        return Decoder(copy.deepcopy(self.model))

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
