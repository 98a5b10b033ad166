"""A live view of one affine map of a model, and what it reads or puts out in a forward pass.

Nothing here copies weights: a `Matrix` reads and writes the model's own parameters, always in (out, in) orientation,
so that no method needs to know that GPT-2's `Conv1D` stores the transpose.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from layerfold.memory.mapped import beside, cloned
from layerfold.model.factored import Factored

MASK = "weight_mask"
"""The buffer beside a weight that says where its zeros are to stay zeros."""


def is_matrix(module: nn.Module) -> bool:
    """Whether a module is a plain affine map that `Matrix` can view."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


class Matrix:
    """A live view of one affine map, whatever stores it (`nn.Linear`, `Conv1D`; `nn.Embedding` as its table).

    Of a weight that blocks share with a low-rank delta, W + A B (`Factored`), it is A, which reads B x and is the
    block's own.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self._transposed = type(module).__name__ == "Conv1D"
        self._delta = isinstance(module, Factored)

    @property
    def _parameter(self) -> Tensor:
        parameter: Tensor = self.module.a if self._delta else self.module.weight
        return parameter

    @property
    def key(self) -> int:
        """The same for two views of one parameter, as tied modules have it."""
        return id(self._parameter)

    @property
    def weight(self) -> Tensor:
        """(out, in); writing into it changes the model."""
        weight = self._parameter.detach()
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

    @property
    def holds_zeros(self) -> bool:
        """Whether a mask holds some of its weights at zero."""
        mask: Tensor | None = getattr(self.module, MASK, None)
        return mask is not None and not mask.all()

    @property
    def inputs(self) -> int:
        """How many channels the module reads."""
        return (self.module.b if self._delta else self.weight).shape[1]

    def features(self, inputs: Tensor) -> Tensor:
        """Return what `weight` multiplies, (..., in), for what the module reads."""
        return linear(inputs, self.module.b.detach()) if self._delta else inputs

    def keep_(self, *, inputs: Tensor | None = None, outputs: Tensor | None = None) -> None:
        """Keep only these inputs and outputs, each (kept,) indices.

        The parameters are new ones: what was tied no longer is.
        """
        for name in ("weight", MASK, "bias"):
            old: Tensor | None = getattr(self.module, name, None)
            if old is None:
                continue
            turned = self._transposed and name != "bias"
            new = old.detach().T if turned else old.detach()  # outputs first
            new = new if outputs is None else new[outputs.to(new.device)]
            new = new if inputs is None or name == "bias" else new[:, inputs.to(new.device)]
            new = beside(old, (new.T if turned else new).clone(memory_format=torch.contiguous_format))
            setattr(self.module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
        sizes = ("nf", "nx") if self._transposed else ("out_features", "in_features")
        for name, size in zip(sizes, self.weight.shape, strict=True):
            setattr(self.module, name, size)

    def tie_(self, other: Matrix) -> None:
        """Use the other matrix's parameters from now on, and its mask."""
        self.module.weight = other.module.weight
        self.module.bias = other.module.bias
        self.module.register_buffer(MASK, getattr(other.module, MASK, None), persistent=False)

    def own_(self) -> None:
        """Use parameters of its own from now on, with the values they have; a weight beside a delta stays shared."""
        for name, parameter in list(self.module.named_parameters(recurse=False)):
            if not (self._delta and name == "weight"):
                setattr(self.module, name, nn.Parameter(cloned(parameter), parameter.requires_grad))


def part_(matrices: Iterable[Matrix], model: nn.Module) -> None:
    """Give matrices parameters of their own where a model uses theirs; matrices that share one go on sharing."""
    used = {id(parameter) for parameter in model.parameters()}
    first: dict[int, Matrix] = {}
    for matrix in matrices:
        if (key := matrix.key) not in used:
            continue
        if key in first:
            matrix.tie_(first[key])
        else:
            first[key] = matrix
            matrix.own_()


class _Stop(Exception):
    """Ends a forward pass once what was wanted has been seen."""


@contextmanager
def watching(
    matrices: Iterable[Matrix], *, outputs: bool = False, stop: bool = False
) -> Iterator[dict[Matrix, Tensor]]:
    """Yield a dict that a forward pass fills with what the module of each matrix reads.

    Args:
        outputs: fill it with what the module puts out instead.
        stop: end the forward pass, and with it the body of the ``with``, as soon as one of them has read.
    """
    seen: dict[Matrix, Tensor] = {}

    def keep(matrix: Matrix, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | None = None) -> None:
        seen[matrix] = inputs[0] if output is None else output
        if stop:
            raise _Stop

    handles = [
        (each.module.register_forward_hook if outputs else each.module.register_forward_pre_hook)(partial(keep, each))
        for each in matrices
    ]
    try:
        yield seen
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
