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
    rows, columns = linear_sum_assignment(correlation.numpy(), maximize=True)
    matched = correlation[torch.from_numpy(rows), torch.from_numpy(columns)]
    return Match(
        order=torch.from_numpy(columns),
        mean_correlation=matched.mean(dtype=torch.float64).item(),
        mean_correlation_unaligned=correlation.diagonal().mean(dtype=torch.float64).item(),
    )
