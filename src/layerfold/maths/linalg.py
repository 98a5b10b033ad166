"""Linear algebra that methods share: tensors in, tensors out."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from layerfold.errors import ModelError

_DAMPING = 0.01
"""Of the mean of H's diagonal, added to it unless said otherwise; ten times more each time H is still not definite."""


@dataclass(frozen=True)
class Match:
    """A one-to-one assignment of one block's neurons to another's.

    Attributes:
        order: (d_ffn,) int64; position i holds the neuron that plays the part of the anchor's neuron i.
        signs: (d_ffn,), -1 where the neuron at position i plays that part with its sign flipped, else 1; None where no
            neuron can be flipped.
        mean_correlation: mean correlation over the matched pairs, after flipping.
        mean_correlation_unaligned: the same without any reordering or flipping, for comparison.
    """

    order: Tensor
    signs: Tensor | None
    mean_correlation: float
    mean_correlation_unaligned: float

    def to(self, device: torch.device) -> Match:
        """Return the same on a device."""
        signs = None if self.signs is None else self.signs.to(device)
        return replace(self, order=self.order.to(device), signs=signs)


def match_neurons(correlation: Tensor, *, flips: bool = False) -> Match:
    """Find the assignment of neurons with the largest total correlation (Hungarian method).

    Args:
        correlation: (d, d), of the processor, where the exact method runs; row i, column j is the correlation of the
            anchor's neuron i with the other's neuron j.
        flips: whether a neuron may change its sign. The absolute correlation counts then.

    Source: Verma and Elbayad, "Merging Feed-Forward Sublayers for Compressed Transformers", 2025, section 3, which
    flips none.
    """
    signed, correlation = correlation, correlation.abs() if flips else correlation
    # Prices near the dual optimum, taken off before the exact method runs, leave it almost nothing to search: the
    # same assignment in a fraction of the time. Each row's and column's constant changes no assignment's rank.
    prices = _prices(correlation)
    costs = correlation.double().neg_().add_(prices)
    costs -= costs.amin(1, keepdim=True)
    rows, columns = linear_sum_assignment(costs.numpy())
    pairs = torch.from_numpy(rows), torch.from_numpy(columns)
    return Match(
        order=pairs[1],
        signs=torch.where(signed[pairs] < 0, -1.0, 1.0) if flips else None,
        mean_correlation=correlation[pairs].mean(dtype=torch.float64).item(),
        mean_correlation_unaligned=signed.diagonal().mean(dtype=torch.float64).item(),
    )


def _prices(values: Tensor, tolerances: tuple[float, ...] = (1e-2, 1e-3, 1e-4), rounds: int = 40) -> Tensor:
    """Return a price for each column, (d,), after a few rounds of an auction in which rows bid for columns.

    Each free row bids for the column of its largest value less price, by as much as it would lose with the second
    best, and a tolerance. Cut short: the prices need only be near the optimum.

    Source: Bertsekas, "The auction algorithm", Annals of Operations Research 14, 1988 (Jacobi version, scaled).
    """
    n = len(values)
    prices = torch.zeros(n)
    if n < 2:
        return prices
    for tolerance in tolerances:
        owner = torch.full((n,), -1)
        free = torch.arange(n)
        for _ in range(rounds):
            if len(free) <= n // 100:
                break
            worth, columns = ((values if len(free) == n else values[free]) - prices).topk(2, dim=1)
            wanted, bids = columns[:, 0], worth[:, 0] - worth[:, 1] + tolerance
            highest = torch.full((n,), -1.0).scatter_reduce_(0, wanted, bids, "amax")
            winning = bids == highest[wanted]
            bidder = torch.full((n,), -1)
            bidder[wanted[winning]] = free[winning]
            sold = bidder >= 0
            prices[sold] += highest[sold]
            owner = torch.where(sold, bidder, owner)
            taken = torch.zeros(n, dtype=torch.bool)
            taken[owner[owner >= 0]] = True
            free = torch.nonzero(~taken)[:, 0]
    return prices


def damped_factor(moments: Tensor, damping: float = _DAMPING) -> Tensor:
    """Return the lower Cholesky factor of H, (d, d), with as much added to its diagonal as makes it definite.

    Args:
        damping: how much at first, as a fraction of the diagonal's mean.

    Raises:
        ModelError: H is not finite.

    Source: Frantar and Alistarh, "SparseGPT", 2023 (the damping).
    """
    return damped(moments, damping)[1]


def damped(moments: Tensor, damping: float = _DAMPING) -> tuple[Tensor, Tensor]:
    """Return H with what `damped_factor` adds to it, and that factor."""
    mean = float(moments.diagonal().mean())
    if not math.isfinite(mean) or not moments.isfinite().all():
        raise ModelError("activations on the calibration text are not finite")
    damping *= mean or 1.0
    while True:
        found = moments.clone()
        found.diagonal().add_(damping)
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(found)
        if not failed:
            return found, factor
        damping *= 10


@dataclass(frozen=True)
class Directions:
    """Orthonormal directions among a matrix's outputs, by how much of what it puts out lies along them.

    Attributes:
        basis: (out, kept), in its columns.
        energies: (n,), the mean square of the output along each, falling; they sum up to that of all of it. n is the
            lesser of inputs and outputs, of which the first may have been kept only.
    """

    basis: Tensor
    energies: Tensor

    def factors(self, matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Return A, (out, rank), and B, (rank, in), whose product projects a matrix's outputs on the first directions.

        Each column of A and its row of B are of one length, except where the row is nothing.
        """
        a = self.basis[:, :rank]
        b = a.T @ matrix
        lengths = b.norm(dim=1)
        scales = torch.where(lengths > 0, lengths, 1.0).sqrt()
        return a * scales, b / scales[:, None]


@torch.no_grad()
def output_directions(matrix: Tensor, root: Tensor | None = None, most: int | None = None) -> Directions:
    """Return the directions along which y = M x is largest, of which the first r give the best approximation of rank r.

    That of the least E|M x - A B x|^2: with H = E[x x^T] = L L^T it is |(M - A B) L|_F^2, of which the left singular
    vectors U of M L are the minimum (Eckart and Young, 1936), and A B = U U^T M needs no inverse of L.

    Args:
        matrix: M, (out, in).
        root: L, (in, in), as `damped_factor` gives it; None takes the identity, which approximates M itself.
        most: keep so many; None keeps all.

    Source: Wang et al., "SVD-LLM: Truncation-aware Singular Value Decomposition", 2024, section 3 (the whitening).
    """
    product = matrix if root is None else matrix @ root
    # From the smaller of the two squares: an SVD takes many times as long.
    if product.shape[0] <= product.shape[1]:
        energies, basis = torch.linalg.eigh(product @ product.T)
        basis = basis.flip(1)[:, :most]
    else:
        energies, right = torch.linalg.eigh(product.T @ product)
        # Orthonormal even where the energy is lost in rounding.
        basis = torch.linalg.qr(product @ right.flip(1)[:, :most]).Q
    return Directions(basis.contiguous(), energies.flip(0).clamp_min(0))
