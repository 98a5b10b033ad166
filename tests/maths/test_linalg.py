from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerfold.errors import ModelError
from layerfold.maths.linalg import damped_factor, match_neurons, output_directions

Array = NDArray[np.float64]
SHAPES = pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8), (1, 5), (5, 1)])


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


def test_negative_correlations_are_matched_last_or_by_their_absolute_value_where_neurons_may_be_flipped() -> None:
    correlation = torch.tensor([[-0.9, 0.1, 0.0], [0.2, 0.0, -0.5], [0.0, 0.0, 0.3]])
    before = correlation.clone()
    match, flipped = match_neurons(correlation), match_neurons(correlation, flips=True)
    assert (match.order.tolist(), match.signs) == ([1, 0, 2], None)
    assert match.mean_correlation == pytest.approx(0.2)
    assert flipped.signs is not None
    assert (flipped.order.tolist(), flipped.signs.tolist()) == ([0, 2, 1], [-1, -1, 1])
    assert flipped.mean_correlation == pytest.approx((0.9 + 0.5 + 0) / 3)
    assert flipped.mean_correlation_unaligned == pytest.approx((-0.9 + 0 + 0.3) / 3)
    assert torch.equal(correlation, before)


# Low rank


def matrix(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape)


def tensor(array: Array) -> Tensor:
    return torch.tensor(array, dtype=torch.float32)


def root_of(d: int, seed: int = 1) -> Array:
    """Of the second moments of inputs that are correlated and of different sizes."""
    x = matrix(200, d, seed=seed) @ (np.eye(d) + 0.5 * matrix(d, d, seed=seed + 1)) * np.linspace(0.2, 2, d)
    return np.asarray(np.linalg.cholesky(x.T @ x / 200 + 0.01 * np.eye(d)))


@SHAPES
@pytest.mark.parametrize("weighted", [False, True])
def test_the_first_directions_are_the_best_approximation_of_every_rank(shape: tuple[int, int], weighted: bool) -> None:
    m, root = matrix(*shape), root_of(shape[1]) if weighted else np.eye(shape[1])
    singular = np.linalg.svd(m @ root, compute_uv=False)
    found = output_directions(tensor(m), tensor(root) if weighted else None)
    for rank in range(min(shape) + 1):
        a, b = found.factors(tensor(m), rank)
        assert (a.shape, b.shape) == ((shape[0], rank), (rank, shape[1]))
        error = np.square((m - (a @ b).double().numpy()) @ root).sum()
        assert error == pytest.approx(np.square(singular[rank:]).sum(), rel=1e-4, abs=1e-9)
    assert found.energies.numpy() == pytest.approx(singular**2, rel=1e-4, abs=1e-5)
    assert float(found.energies.sum()) == pytest.approx(np.square(m @ root).sum(), rel=1e-5)


@SHAPES
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_directions_are_orthonormal_whatever_the_rank_of_the_matrix(shape: tuple[int, int], rank: int) -> None:
    m = tensor(matrix(shape[0], rank) @ matrix(rank, shape[1], seed=1))
    found = output_directions(m)
    assert found.basis.shape == (shape[0], min(shape))
    assert (found.basis.T @ found.basis - torch.eye(min(shape))).abs().max() < 1e-5
    assert (found.energies >= 0).all()
    assert (found.energies.diff() <= 0).all()
    a, b = found.factors(m, min(rank, *shape))
    assert (a @ b - m).abs().max() < 1e-4 * max(1.0, float(m.abs().max()))


def test_a_column_of_a_and_its_row_of_b_are_of_one_length() -> None:
    m = tensor(matrix(6, 10))
    a, b = output_directions(m, tensor(root_of(10))).factors(m, 4)
    assert a.norm(dim=0).tolist() == pytest.approx(b.norm(dim=1).tolist(), rel=1e-5)
    a, b = output_directions(torch.zeros(6, 10)).factors(torch.zeros(6, 10), 2)
    assert a.norm(dim=0).tolist() == pytest.approx([1, 1])
    assert not b.any()


def test_a_damped_factor_is_of_h_and_a_share_of_its_diagonals_mean() -> None:
    h = matrix(200, 5).T @ matrix(200, 5)
    for damping in (0.01, 1.0):
        root = damped_factor(tensor(h), damping).double().numpy()
        expected = h + damping * np.diag(h).mean() * np.eye(5)
        assert root @ root.T == pytest.approx(expected, rel=1e-4, abs=1e-3)
        assert np.array_equal(root, np.tril(root))


@pytest.mark.parametrize("h", [torch.zeros(4, 4), torch.ones(4, 4), torch.ones(4, 4) - 0.5 * torch.eye(4)])
def test_a_damped_factor_exists_where_h_is_not_definite(h: Tensor) -> None:
    before = h.clone()
    root = damped_factor(h)
    assert root.isfinite().all()
    assert (root.diagonal() > 0).all()
    added = root @ root.T - h
    assert (added - added[0, 0] * torch.eye(4)).abs().max() < 1e-5
    assert torch.equal(h, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_damped_factor_of_what_is_not_finite_is_an_error(bad: float) -> None:
    h = torch.eye(3)
    h[0, 2] = bad
    with pytest.raises(ModelError, match="activations on the calibration text are not finite"):
        damped_factor(h)
