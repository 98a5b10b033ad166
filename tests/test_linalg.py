from __future__ import annotations

import numpy as np
import pytest
import torch

from layerfold.linalg import match_neurons


def test_a_known_permutation_is_recovered() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 40, generator=generator)
    shuffled = x[:, torch.randperm(40, generator=generator)] + 0.1 * torch.randn(500, 40, generator=generator)
    correlation = torch.from_numpy(np.corrcoef(x.T, shuffled.T)[:40, 40:]).float()
    match = match_neurons(correlation)
    restored = shuffled[:, match.order]
    assert (restored - x).abs().max() < 0.6  # the noise alone; two other neurons would differ by several units
    assert match.mean_correlation > 0.98
    assert abs(match.mean_correlation_unaligned) < 0.2


def test_the_total_is_maximised_and_not_each_row() -> None:
    # Taking the largest first, 0.9, leaves 0.1: the other assignment has the larger total.
    match = match_neurons(torch.tensor([[0.9, 0.8], [0.8, 0.1]]))
    assert match.order.tolist() == [1, 0]
    assert match.mean_correlation == pytest.approx(0.8)
    assert match.mean_correlation_unaligned == pytest.approx(0.5)


def test_negative_correlations_are_matched_last() -> None:
    match = match_neurons(torch.tensor([[-0.9, 0.1, 0.0], [0.2, 0.0, -0.5], [0.0, 0.0, 0.3]]))
    assert match.order.tolist() == [1, 0, 2]
    assert match.mean_correlation == pytest.approx(0.2)
