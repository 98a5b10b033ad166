"""The FFN of a block: its matrices, its neurons, and the edits on them."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from layerfold.model.families import Family
from layerfold.model.matrix import Matrix, watching


class FFN:
    """A block's feed-forward part: down(act(up x)), or down(act(gate x) * up x) where it is gated.

    A *neuron* is one of the `d_ffn` inputs of `down`.

    Args:
        module: what holds its matrices.

    Attributes:
        up, down: the matrices before and after the activation.
        gate: the gate's matrix; None where there is none, or where `up` holds both, the gate's rows first.
    """

    def __init__(self, module: nn.Module, family: Family) -> None:
        def matrix(name: str) -> Matrix:
            return Matrix(operator.attrgetter(name)(module))

        self.module, self._family = module, family
        self.up, self.down = matrix(family.up), matrix(family.down)
        self.gate = None if family.gate is None or family.fused_gate else matrix(family.gate)

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """`up`, `gate` where it is a matrix of its own, `down`."""
        return (self.up, self.down) if self.gate is None else (self.up, self.gate, self.down)

    @property
    def units(self) -> list[Tensor]:
        """Live views of all that goes with a neuron, each (d_ffn, parameters): the neuron comes first.

        Of a matrix that holds gate and `up`, a copy.
        """
        inner = [tensor for matrix in self.matrices if matrix is not self.down for tensor in matrix.tensors]
        if self._family.fused_gate:
            inner = [tensor.unflatten(0, (2, self.d_ffn)).transpose(0, 1) for tensor in inner]
        return [tensor.reshape(self.d_ffn, -1) for tensor in (*inner, self.down.weight.T)]

    @property
    def d_ffn(self) -> int:
        """The number of neurons."""
        return self.down.weight.shape[1]

    def rows(self, neurons: Tensor) -> Tensor:
        """Return which outputs of the first matrices are these neurons', (outputs,) indices."""
        return torch.cat([neurons, neurons + self.d_ffn]) if self._family.fused_gate else neurons

    def by_neuron(self, rows: Tensor) -> Tensor:
        """Return what is known of a first matrix's outputs, (outputs,), by neuron: (1, d_ffn).

        (2, d_ffn), that of `up` first, where the matrix holds both.
        """
        return rows.view(2, -1).flip(0) if self._family.fused_gate else rows[None]

    def by_row(self, neurons: Tensor) -> Tensor:
        """Undo `by_neuron`."""
        return (neurons.flip(0) if self._family.fused_gate else neurons).reshape(-1)

    def keep_(self, neurons: Tensor) -> None:
        """Keep only these neurons, (kept,) indices; the parameters are new ones."""
        rows = self.rows(neurons)
        for matrix in self.matrices:
            if matrix is self.down:
                matrix.keep_(inputs=neurons)
            else:
                matrix.keep_(outputs=rows)

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
                rows = self.rows(order)
                weight, bias = weight[rows], None if bias is None else bias[rows]
                if signs is not None and matrix is self.up:
                    flips = torch.cat([torch.ones_like(signs), signs]) if self._family.fused_gate else signs
                    weight *= flips[:, None]
                    bias = None if bias is None else bias * flips.to(bias.dtype)
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

    def copy(self) -> FFN:
        """Return an FFN with parameters of its own, outside of the model."""
        return FFN(copy.deepcopy(self.module), self._family)

    def own_(self) -> None:
        """Use parameters of its own from now on, with the values they have."""
        for matrix in self.matrices:
            matrix.own_()

    @torch.no_grad()
    def neurons(self, inputs: Tensor) -> Tensor:
        """Compute the neurons' activations, (..., d_ffn), from the FFN's inputs, (..., d_model)."""
        if self._family.act:
            found: Tensor = operator.attrgetter(self._family.act)(self.module)(self.up.module(inputs))
            return found
        with watching((self.down,), stop=True) as seen:
            self.module(inputs, *([inputs] if self._family.adds else []))
        return seen[self.down]
