"""The lowest of many scores, against a stable sort of all of them at once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from layerfold.maths.ranking import lowest, lowest_in_rows, shares

# Zero, numbers below the least normal one, neighbours that differ in the last bit, powers of two around the half of
# the bits that are counted first, the largest, infinity.
SPECIAL = [0.0, 1e-45, 1e-40, 1.1754944e-38, 0.1, 1.0, 1.0000001, 1.5, 2.0, 2.0000002, 65536.0, 3.4028235e38, np.inf]
SHAPES = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4)


def drawn(shapes: list[tuple[int, int]], kind: str, seed: int) -> list[Tensor]:
    """Scores of several matrices, every other stored transposed."""
    rng = np.random.default_rng(seed)
    make = {
        "special": lambda shape: rng.choice(SPECIAL, shape),
        "few": lambda shape: rng.integers(0, 3, shape) / 8,
        "many": lambda shape: np.exp(20 * rng.normal(size=shape)),
    }[kind]
    found = [torch.tensor(make(shape), dtype=torch.float32) for shape in shapes]
    return [each if i % 2 else each.T.contiguous().T for i, each in enumerate(found)]


@settings(max_examples=150, deadline=None)
@given(SHAPES, st.sampled_from(["special", "few", "many"]), st.floats(0, 1), st.integers(0, 2**16))
def test_the_lowest_of_all_are_those_of_a_stable_sort(
    shapes: list[tuple[int, int]], kind: str, share: float, seed: int
) -> None:
    found = drawn(shapes, kind, seed)
    joined = np.concatenate([each.numpy().ravel() for each in found])
    count = round(share * joined.size)
    expected = np.zeros(joined.size, dtype=bool)
    expected[np.argsort(joined, kind="stable")[:count]] = True
    marked = list(lowest(lambda: iter(found), count))
    assert [each.shape for each in marked] == [each.shape for each in found]
    assert np.array_equal(np.concatenate([each.numpy().ravel() for each in marked]), expected)


def test_no_more_than_one_of_the_scores_need_be_there_at_a_time() -> None:
    alive = 0

    class Counted:
        def __init__(self) -> None:
            nonlocal alive
            alive += 1
            assert alive == 1

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def scores() -> Iterator[Tensor]:
        for seed in range(4):
            counted = Counted()
            yield drawn([(5, 5)], "many", seed)[0]
            del counted

    assert sum(int(each.sum()) for each in lowest(scores, 37)) == 37


def test_a_matrix_may_be_edited_before_the_next_is_scored() -> None:
    weights = drawn([(4, 4)] * 3, "few", 0)
    expected = [each.clone() for each in lowest(lambda: [each.clone() for each in weights], 20)]
    for weight, lost, same in zip(weights, lowest(lambda: iter(weights), 20), expected, strict=True):
        assert torch.equal(lost, same)
        weight.fill_(99)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 9),
    st.sampled_from(["special", "few", "many"]),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_the_lowest_of_each_row_are_those_of_a_stable_sort(
    rows: int, columns: int, kind: str, alike: bool, seed: int
) -> None:
    found = drawn([(rows, columns)], kind, seed)[0]
    counts = np.random.default_rng(seed).integers(0, columns + 1, 1 if alike else rows)
    marked = lowest_in_rows(found, torch.tensor(counts[0]) if alike else torch.tensor(counts)).numpy()
    for row, count, scores in zip(marked, np.broadcast_to(counts, rows), found.numpy(), strict=True):
        assert set(np.flatnonzero(row)) == set(np.argsort(scores, kind="stable")[:count])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.floats(0, 1))
def test_shares_add_up_and_are_in_proportion(sizes: list[int], share: float) -> None:
    total = sum(sizes)
    count = round(share * total)
    found = shares(count, torch.tensor(sizes)).tolist()
    assert sum(found) == count
    for size, part in zip(sizes, found, strict=True):
        assert 0 <= part <= size
        assert abs(part - count * size / max(total, 1)) < 1 + 1e-9


@pytest.mark.parametrize("sizes", [[3 * 10**9, 10**9, 3 * 10**9], [7 * 10**9]])
def test_shares_of_billions_do_not_overflow(sizes: list[int]) -> None:
    total = sum(sizes)
    assert shares(total // 2, torch.tensor(sizes)).tolist() == pytest.approx([size / 2 for size in sizes], abs=1)
    assert shares(total, torch.tensor(sizes)).tolist() == sizes


def test_nothing_is_shared_among_nothing() -> None:
    assert shares(0, torch.tensor([0, 0])).tolist() == [0, 0]
    assert shares(0, torch.tensor([], dtype=torch.int64)).tolist() == []
