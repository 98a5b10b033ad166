"""A matrix that is a weight of several blocks plus a low-rank delta of one's own."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from layerfold.memory.mapped import beside


class Factored(nn.Module):
    """y = (W + A B) x + c, computed without forming A B.

    Args:
        weight: W, (out, in); a parameter is used as it is, so that several modules can share it.
        a: A, (out, rank).
        b: B, (rank, in).
        bias: c, (out,), or None.
        stock: the type of module that this stands for: `nn.Linear`, or transformers' `Conv1D`.
    """

    def __init__(self, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, stock: type[nn.Module]) -> None:
        super().__init__()
        self.weight = _parameter(weight)
        self.a, self.b = _parameter(a), _parameter(b)
        self.bias = None if bias is None else _parameter(bias)
        self.stock = stock

    @property
    def rank(self) -> int:
        """Of the delta."""
        return self.b.shape[0]

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (..., out) for inputs, (..., in)."""
        outputs = linear(inputs, self.weight, self.bias)
        return outputs + linear(linear(inputs, self.b), self.a) if self.rank else outputs

    def square(self) -> Tensor:
        """Return |A B|_F^2 = tr(A^T A B B^T), a scalar, without forming A B."""
        return ((self.a.T @ self.a) * (self.b @ self.b.T)).sum()

    def without_delta(self) -> Factored:
        """Return a module of the same weight and bias with a delta of rank 0."""
        return Factored(self.weight, self.a[:, :0], self.b[:0], self.bias, self.stock)

    @torch.no_grad()
    def multiplied_out(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return the plain module that computes the same, with parameters of its own.

        Args:
            dtype: of the product and its weight; None takes the module's own.
        """
        dtype = self.weight.dtype if dtype is None else dtype
        out, inputs = self.weight.shape
        weight = beside(self.weight, torch.addmm(*(each.to(dtype) for each in (self.weight, self.a, self.b))))
        with torch.device("meta"):  # its own initial values are not wanted
            if issubclass(self.stock, nn.Linear):
                plain: Any = self.stock(inputs, out, bias=self.bias is not None)
            else:
                plain, weight = self.stock(out, inputs), weight.T.contiguous()
        plain.weight = nn.Parameter(weight)
        plain.bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone())
        plain.train(self.training)
        return cast(nn.Module, plain)


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
