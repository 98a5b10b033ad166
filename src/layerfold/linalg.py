"""Linear algebra that methods share: tensors in, tensors out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


@dataclass(frozen=True)
class Match:
    """A one-to-one assignment of one block's neurons to another's.

    Attributes:
        order: (d_ffn,) int64; position i holds the neuron that plays the part of the anchor's neuron i.
        mean_correlation: mean correlation over the matched pairs.
        mean_correlation_unaligned: the same without any reordering, for comparison.
    """

    order: Tensor
    mean_correlation: float
    mean_correlation_unaligned: float


def match_neurons(correlation: Tensor) -> Match:
    """Find the assignment of neurons with the largest total correlation (Hungarian method).

    Args:
        correlation: (d, d); row i, column j is the correlation of the anchor's neuron i with the other's neuron j.

    Source: Verma and Elbayad, "Merging Feed-Forward Sublayers for Compressed Transformers", 2025, section 3.
    """
    # Prices near the dual optimum, taken off before the exact method runs, leave it almost nothing to search: the
    # same assignment in a fraction of the time. Each row's and column's constant changes no assignment's rank.
    prices = _prices(correlation)
    costs = correlation.double().neg_().add_(prices)
    costs -= costs.amin(1, keepdim=True)
    rows, columns = linear_sum_assignment(costs.numpy())
    matched = correlation[torch.from_numpy(rows), torch.from_numpy(columns)]
    return Match(
        order=torch.from_numpy(columns),
        mean_correlation=matched.mean(dtype=torch.float64).item(),
        mean_correlation_unaligned=correlation.diagonal().mean(dtype=torch.float64).item(),
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
