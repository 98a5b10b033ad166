"""Live views of a block's feed-forward part and of its matrices, and the edits on them.

Nothing here copies weights: a `Matrix` reads and writes the model's own parameters, always in (out, in) orientation,
so that no method needs to know that GPT-2's `Conv1D` stores the transpose.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerfold.model.families import Family

MASK = "weight_mask"
"""The buffer beside a weight that says where its zeros are to stay zeros."""


def is_matrix(module: nn.Module) -> bool:
    """Whether a module is an affine map that `Matrix` can view."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


class Matrix:
    """A live view of one affine map, whatever stores it (`nn.Linear`, `Conv1D`; `nn.Embedding` as its table)."""

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
        bias = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """`weight`, and `bias` where there is one."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def keep_(self, *, inputs: Tensor | None = None, outputs: Tensor | None = None) -> None:
        """Keep only these inputs and outputs, each (kept,) indices.

        The parameters are new ones: what was tied no longer is.
        """
        module: Any = self.module
        for name in ("weight", MASK, "bias"):
            old: Tensor | None = getattr(module, name, None)
            if old is None:
                continue
            turned = self._transposed and name != "bias"
            new = old.detach().T if turned else old.detach()  # outputs first
            new = new if outputs is None else new[outputs]
            new = new if inputs is None or name == "bias" else new[:, inputs]
            new = (new.T if turned else new).clone(memory_format=torch.contiguous_format)
            setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
        sizes = ("nf", "nx") if self._transposed else ("out_features", "in_features")
        for name, size in zip(sizes, self.weight.shape, strict=True):
            setattr(module, name, size)

    def tie_(self, other: Matrix) -> None:
        """Use the other matrix's parameters from now on, and its mask."""
        self.module.weight = other.module.weight
        self.module.bias = other.module.bias
        self.module.register_buffer(MASK, getattr(other.module, MASK, None), persistent=False)

    def own_(self) -> None:
        """Use parameters of its own from now on, with the values they have."""
        for name, parameter in list(self.module.named_parameters(recurse=False)):
            setattr(self.module, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))


class FFN:
    """A block's feed-forward part: down(act(up x)), or down(act(gate x) * up x) where it is gated.

    A *neuron* is one of the `d_ffn` inputs of `down`.
    """

    def __init__(self, module: nn.Module, family: Family) -> None:
        def matrix(name: str) -> Matrix:
            return Matrix(operator.attrgetter(name)(module))

        self.module = module
        self.up, self.down = matrix(family.up), matrix(family.down)
        self.gate = None if family.gate is None else matrix(family.gate)

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """`up`, `gate` where there is one, `down`."""
        return (self.up, self.down) if self.gate is None else (self.up, self.gate, self.down)

    @property
    def units(self) -> list[Tensor]:
        """Live views of all that goes with a neuron, each (d_ffn, parameters): the neuron comes first."""
        inner = [tensor for matrix in self.matrices if matrix is not self.down for tensor in matrix.tensors]
        return [tensor.reshape(self.d_ffn, -1) for tensor in (*inner, self.down.weight.T)]

    @property
    def d_ffn(self) -> int:
        """The number of neurons."""
        return self.down.weight.shape[1]

    def keep_(self, neurons: Tensor) -> None:
        """Keep only these neurons, (kept,) indices; the parameters are new ones."""
        for matrix in self.matrices:
            if matrix is self.down:
                matrix.keep_(inputs=neurons)
            else:
                matrix.keep_(outputs=neurons)

    def tensors(self, order: Tensor | None = None, signs: Tensor | None = None) -> list[Tensor]:
        """All weights and biases in a fixed order: live, or copied with the neurons reordered.

        Args:
            order: (d_ffn,); None returns live views.
            signs: (d_ffn,), -1 for each neuron, in the new order, whose `up` and `down` are negated, else 1. A gated
                FFN computes the same then.
        """
        found: list[Tensor] = []
        for matrix in self.matrices:
            weight, bias = matrix.weight, matrix.bias
            if order is not None and matrix is self.down:
                weight = weight[:, order] if signs is None else weight[:, order] * signs.to(weight.dtype)
            elif order is not None:
                weight, bias = weight[order], None if bias is None else bias[order]
                if signs is not None and matrix is self.up:
                    weight *= signs[:, None]
                    bias = None if bias is None else bias * signs.to(bias.dtype)
            found += [weight] if bias is None else [weight, bias]
        return found

    def copy_(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite all weights and biases, given in the order of `tensors`."""
        for target, source in zip(self.tensors(), tensors, strict=True):
            target.copy_(source)

    def permute_(self, order: Tensor, signs: Tensor | None = None) -> None:
        """Reorder the neurons; neuron i becomes the old neuron order[i]. Changes no output. See `tensors`."""
        self.copy_(self.tensors(order, signs))

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
