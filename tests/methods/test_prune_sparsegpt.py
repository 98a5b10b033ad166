"""Optimal brain surgery, against what can be solved by hand and against a slow reference, in numpy's float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from layerfold.errors import ModelError
from layerfold.methods.prune import sparsegpt

Array = NDArray[np.float64]


def damped(moments: Array, share: float = 0.01) -> Array:
    return moments + share * np.diag(moments).mean() * np.eye(len(moments))


def error(change: Array, moments: Array) -> float:
    return float(np.einsum("oi,ij,oj->", change, moments, change))


def inputs(d: int, seed: int, rows: int = 200) -> Array:
    """Correlated, of different sizes, their mean not zero."""
    rng = np.random.default_rng(seed)
    return 0.3 + rng.normal(size=(rows, d)) @ (np.eye(d) + 0.5 * rng.normal(size=(d, d))) * rng.uniform(0.3, 2, d)


def moments_of(d: int, seed: int, rows: int = 200) -> Array:
    x = inputs(d, seed, rows)
    return x.T @ x / rows


def weights(out: int, d: int, seed: int) -> Array:
    return np.random.default_rng(seed + 1000).normal(size=(out, d))


def tensor(array: Array) -> Tensor:
    return torch.tensor(array, dtype=torch.float32)


def sparsified(weight: Array, moments: Array, zeros: int | None) -> tuple[Array, NDArray[np.bool_]]:
    new, kept = sparsegpt.sparsify(tensor(weight), tensor(moments), zeros)
    assert new.shape == kept.shape == weight.shape
    assert not new[~kept].any()
    return new.double().numpy(), kept.numpy()


def counts_by_piece(empty: NDArray[np.bool_], zeros: int, piece: int) -> list[int]:
    """How many go in each piece of columns, in proportion to what is not zero there, rounded down as it adds up."""
    pieces = [empty[:, start : start + piece] for start in range(0, empty.shape[1], piece)]
    more, left = max(0, zeros - int(empty.sum())), [int((~each).sum()) for each in pieces]
    upto = [more * sum(left[: i + 1]) // max(1, sum(left)) for i in range(len(pieces))]
    return [int(each.sum()) + now - then for each, now, then in zip(pieces, upto, [0, *upto], strict=False)]


def reference(weight: Array, moments: Array, zeros: int | None, piece: int) -> tuple[Array, NDArray[np.bool_]]:
    """Column by column, each time with the inverse of what H has left for this column and those to the right."""
    h, found, empty = damped(moments), weight.copy(), weight == 0
    kept, d = np.ones_like(empty), weight.shape[1]
    inverses = [np.linalg.inv(h[j:, j:]) for j in range(d)]
    counts = None if zeros is None else counts_by_piece(empty, zeros, piece)
    width = 4 if counts is None else piece
    for j in range(d):
        if j % width == 0:
            some = range(j, min(j + width, d))
            scores = np.stack([found[:, k] ** 2 / inverses[k][0, 0] for k in some], axis=1)
            scores[empty[:, some]] = -1
            if counts is None:
                for row, each in enumerate(scores):
                    kept[row, j + np.argsort(each, kind="stable")[:2]] = False
            else:
                lost = np.argsort(scores.T, axis=None, kind="stable")[: counts[j // width]]  # column after column
                kept[lost % len(weight), j + lost // len(weight)] = False
        for row in np.flatnonzero(~kept[:, j]):
            found[row, j:] -= found[row, j] / inverses[j][0, 0] * inverses[j][0]
            found[row, j] = 0
    return found, kept


# By hand


def test_inputs_that_are_not_correlated_leave_the_other_weights_alone() -> None:
    scale = np.array([1.0, 100.0, 4.0, 0.25, 9.0, 0.01])
    weight = weights(5, 6, 0)
    new, kept = sparsified(weight, np.diag(scale), 12)
    scores = weight**2 * np.diag(damped(np.diag(scale)))
    assert np.array_equal(~kept.ravel(), np.isin(np.arange(30), np.argsort(scores, axis=None)[:12]))
    assert np.array_equal(new, np.where(kept, tensor(weight), 0))


def test_one_weight_of_two_goes_and_the_other_makes_up_for_it() -> None:
    # Damping adds 0.01 of the mean 1, and what is left is H = ((a, b), (b, c)).
    a, b, c = 1 + 0.01, 0.6, 1 + 0.01
    new, kept = sparsified(np.array([[0.5, 2.0]]), np.array([[1, b], [b, 1]]), 1)
    assert kept.tolist() == [[False, True]]
    # The least of (0.5)^2 a - 2 * 0.5 * b * d + d^2 c is at d = 0.5 b / c.
    assert new[0] == pytest.approx([0, 2 + 0.5 * b / c], abs=1e-6)
    change = new - [[0.5, 2.0]]
    assert error(change, np.array([[a, b], [b, c]])) == pytest.approx(0.25 * (a - b * b / c), rel=1e-5)


# Against the slow reference


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 6),
    d=st.integers(1, 20),
    piece=st.sampled_from([3, 8, 128]),
    share=st.floats(0, 1),
    holes=st.sampled_from([0, 0.3]),
    seed=st.integers(0, 2**16),
)
def test_any_number_of_zeros_as_in_the_slow_reference(
    out: int, d: int, piece: int, share: float, holes: float, seed: int
) -> None:
    weight, moments = weights(out, d, seed), moments_of(d, seed)
    weight[np.random.default_rng(seed).random(weight.shape) < holes] = 0
    zeros, had = round(share * weight.size), weight == 0
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sparsegpt, "_COLUMNS", piece)
        new, kept = sparsified(weight, moments, zeros)
    assert (~kept).sum() == max(zeros, had.sum())
    assert not kept[had].any()
    if zeros <= had.sum():
        assert np.array_equal(new, tensor(weight))
    expected, expected_kept = reference(weight, moments, zeros, piece)
    assert np.array_equal(kept, expected_kept)
    assert new == pytest.approx(expected, abs=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("piece", [8, 128])
def test_two_of_four_as_in_the_slow_reference(seed: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparsegpt, "_COLUMNS", piece)
    weight, moments = weights(6, 20, seed), moments_of(20, seed)
    weight[:, 3:6] = 0
    new, kept = sparsified(weight, moments, None)
    expected, expected_kept = reference(weight, moments, None, piece)
    assert np.array_equal(kept, expected_kept)
    assert new == pytest.approx(expected, abs=2e-3 * np.abs(expected).max())
    assert (kept.reshape(6, 5, 4).sum(2) <= 2).all()


@pytest.mark.parametrize("zeros", [600, 1500, 2400, None])
@pytest.mark.parametrize("seed", range(3))
def test_what_the_others_make_up_for_is_worth_it(zeros: int | None, seed: int) -> None:
    weight, moments = weights(20, 150, seed), moments_of(150, seed, rows=600)
    if zeros is None:
        weight, moments = weight[:, :148], moments[:148, :148]
    new, kept = sparsified(weight, moments, zeros)
    plain = np.where(kept, weight, 0)
    assert error(new - weight, moments) < 0.9 * error(plain - weight, moments)


def test_weights_stored_transposed_are_the_same_weights() -> None:
    weight, moments = tensor(weights(6, 8, 0)), tensor(moments_of(8, 0))
    one, two = (sparsegpt.sparsify(each, moments, 20) for each in (weight, weight.T.contiguous().T))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


# Inputs that say nothing, or too much


@pytest.mark.parametrize("zeros", [0, 7, 24, None])
def test_inputs_that_are_always_zero(zeros: int | None) -> None:
    weight = weights(3, 8, 0)
    new, kept = sparsified(weight, np.zeros((8, 8)), zeros)
    assert np.array_equal(new, np.where(kept, tensor(weight), 0))
    assert (~kept).sum() == (12 if zeros is None else zeros)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("rank", [1, 3])
def test_fewer_rows_than_inputs(rank: int, size: float) -> None:
    moments, weight = size * moments_of(12, 0, rows=rank), weights(4, 12, 0)
    new, kept = sparsified(weight, moments, 24)
    assert np.isfinite(new).all()
    assert (~kept).sum() == 24
    expected, _ = reference(weight, moments, 24, 128)
    assert error(new - weight, moments) == pytest.approx(error(expected - weight, moments), rel=0.02)


def test_moments_that_rounding_made_indefinite() -> None:
    moments = np.ones((6, 6)) - 0.2 * np.eye(6)  # its lowest eigenvalue is -0.2: more damping than 1 % is needed
    new, kept = sparsified(weights(3, 6, 0), moments, 9)
    assert np.isfinite(new).all()
    assert (~kept).sum() == 9


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("place", [(0, 0), (0, 5)])
def test_moments_that_are_not_finite_are_an_error_and_no_endless_loop(bad: float, place: tuple[int, int]) -> None:
    moments = torch.eye(6)
    moments[place] = bad
    if bad == 3e38:
        moments.diagonal().fill_(bad)  # whose sum is beyond float32
    with pytest.raises(ModelError, match="not finite"):
        sparsegpt.sparsify(torch.ones(2, 6), moments, 3)


# Neurons


@pytest.mark.parametrize("seed", range(4))
def test_the_error_of_a_removal_is_what_is_left_when_all_others_make_up_for_it(seed: int) -> None:
    weight, moments = weights(5, 7, seed), moments_of(7, seed)
    found = sparsegpt.removal_errors(tensor(weight), tensor(moments)).numpy()
    h = damped(moments)
    for j in range(7):
        rest = [i for i in range(7) if i != j]
        made_up = np.linalg.solve(h[np.ix_(rest, rest)], h[rest, j])  # least squares of one input by the others
        left = h[j, j] - h[j, rest] @ made_up
        assert found[j] == pytest.approx((weight[:, j] ** 2).sum() * left, rel=1e-3)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(2, 14), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**16))
def test_a_refit_never_raises_the_error(out: int, d: int, rows: int, share: float, seed: int) -> None:
    weight, moments = weights(out, d, seed), moments_of(d, seed, rows)
    kept = np.sort(np.random.default_rng(seed).permutation(d)[: max(1, round(share * d))])
    found = sparsegpt.refitted(tensor(weight), tensor(moments), torch.tensor(kept)).double().numpy()
    assert found.shape == (out, len(kept))

    def of(some: Array) -> float:
        whole = np.zeros_like(weight)
        whole[:, kept] = some
        return error(whole - weight, moments)

    assert of(found) <= of(weight[:, kept]) * (1 + 1e-3) + 1e-9
    h = moments[np.ix_(kept, kept)]
    damping = 0.01 * np.diag(h).mean()
    expected = np.linalg.solve(
        h + damping * np.eye(len(kept)), (weight @ moments[:, kept] + damping * weight[:, kept]).T
    )
    assert found == pytest.approx(expected.T, abs=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize(
    "moments", [moments_of(9, 0), moments_of(9, 0, rows=3), np.zeros((9, 9))], ids=["full", "3", "0"]
)
def test_a_refit_of_all_inputs_is_the_identity(moments: Array) -> None:
    weight = tensor(weights(4, 9, 0))
    assert torch.equal(sparsegpt.refitted(weight, tensor(moments), torch.arange(9)), weight)
