"""Sums of products over tokens: moments of one set of channels, and of two."""

from __future__ import annotations

import torch
from torch import Tensor

from layerfold.maths.precision import widest

_STRIP = 512
"""Rows of a symmetric product that `SecondMoments` computes at a time."""


_ROWS = 256
"""Rows that `CrossMoments` copies at a time on a processor, where they stay in cache; on a GPU, 64 times as many."""


class CrossMoments:
    """Accumulate what the correlations between two sets of variables need, one batch of rows at a time.

    Holds one (d_x, d_y) float32 matrix whatever the number of rows. Rows are shifted by the first batch's means, so
    that variables whose mean is large against their deviation lose no precision.
    """

    def __init__(self) -> None:
        self.count = 0

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add rows: x is (rows, d_x), y is (rows, d_y)."""
        x, y = x.float(), y.float()
        if self.count == 0:
            self._shift_x, self._shift_y = x.mean(0), y.mean(0)
            self._product = x.new_zeros(x.shape[1], y.shape[1])
            self._sums = [x.new_zeros(each.shape[1], dtype=widest(x.device)) for each in (x, y)]
            self._squares = [torch.zeros_like(total) for total in self._sums]
        self.count += x.shape[0]
        rows_at_once = _ROWS if x.device.type == "cpu" else 64 * _ROWS
        for some_x, some_y in zip(x.split(rows_at_once), y.split(rows_at_once), strict=True):
            shifted = some_x - self._shift_x, some_y - self._shift_y
            self._product.addmm_(shifted[0].T, shifted[1])
            for rows, sums, squares in zip(shifted, self._sums, self._squares, strict=True):
                # Float32 within these few rows, float64 over all of them.
                sums += rows.sum(0)
                squares += rows.square_().sum(0)

    @property
    def finite(self) -> tuple[bool, bool]:
        """Whether the squares of x are finite, and those of y."""
        x, y = (bool(squares.isfinite().all()) for squares in self._squares)
        return x, y

    def correlation(self) -> Tensor:
        """Return the (d_x, d_y) Pearson correlations; 0 where a variable is constant. Consumes the accumulator."""
        means = [sums / self.count for sums in self._sums]
        deviations = [
            (squares / self.count - mean.square()).clamp_min(0).sqrt()
            for squares, mean in zip(self._squares, means, strict=True)
        ]
        # A deviation this small against the variable's own size is rounding: the variable is constant.
        scales = [
            torch.where(deviation > 1e-6 * shift.abs().to(deviation.dtype), 1 / deviation, 0.0).float()
            for deviation, shift in zip(deviations, (self._shift_x, self._shift_y), strict=True)
        ]
        product, self._product = self._product, torch.empty(0)
        product /= self.count
        product.addr_(means[0].float(), means[1].float(), alpha=-1)
        product *= scales[0][:, None]
        product *= scales[1]
        return product.clamp_(-1, 1)


class SecondMoments:
    """Accumulate E[x x^T], or only its diagonal, one batch of rows at a time.

    Args:
        whole: whether the moments of pairs of variables are wanted too.

    Attributes:
        count: how many rows there were.
    """

    def __init__(self, whole: bool) -> None:
        self._whole = whole
        self.count = 0

    def update(self, x: Tensor) -> None:
        """Add rows: x is (rows, d)."""
        x = x.float()
        if self.count == 0:
            self._sums = x.new_zeros(x.shape[1], dtype=widest(x.device))
            self._products = x.new_zeros(x.shape[1], x.shape[1] if self._whole else 0)
            self._squares = torch.zeros_like(self._sums)
        self.count += len(x)
        self._sums += x.sum(0)
        if not self._whole:
            self._squares += x.square().sum(0)
            return
        for start in range(0, x.shape[1], _STRIP):  # the matrix is symmetric: of what is below its diagonal little
            strip = self._products[start : start + _STRIP, start:]
            strip.addmm_(x[:, start : start + _STRIP].T, x[:, start:])

    @property
    def mean(self) -> Tensor:
        """E[x], (d,)."""
        return (self._sums / self.count).float()

    @property
    def squares(self) -> Tensor:
        """E[x^2], (d,)."""
        found = self._products.diagonal() if self._whole else self._squares
        return (found / self.count).float()

    @property
    def products(self) -> Tensor:
        """E[x x^T], (d, d), where it was wanted."""
        self._mirror()
        return self._products / self.count

    def consumed(self) -> Tensor:
        """Return E[x x^T], (d, d), in the accumulator's memory: only the mean can be asked for then."""
        self._mirror()
        found, self._products = self._products, self._products.new_empty(0, 0)
        return found.div_(self.count)

    def _mirror(self) -> None:
        for start in range(_STRIP, len(self._products), _STRIP):
            self._products[start:, start - _STRIP : start] = self._products[start - _STRIP : start, start:].T
