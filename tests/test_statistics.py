from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerfold import statistics
from layerfold.statistics import (
    CrossMoments,
    Interval,
    SecondMoments,
    bootstrap_mean,
    bootstrap_median,
    bootstrap_ratio,
    wilson,
)


def streamed(x: torch.Tensor, y: torch.Tensor, cuts: list[int]) -> np.ndarray:
    moments = CrossMoments()
    bounds = [0, *sorted({cut for cut in cuts if 0 < cut < len(x)}), len(x)]
    for first, last in pairwise(bounds):
        moments.update(x[first:last], y[first:last])
    return moments.correlation().numpy()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(8, 60),
    widths=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    cuts=st.lists(st.integers(1, 59), max_size=6),
    shift=st.sampled_from([0.0, 3.0, -1e4, 1e4]),
    scale=st.sampled_from([1.0, 50.0]),
    seed=st.integers(0, 2**16),
)
def test_correlations_equal_numpys_for_any_batching(
    rows: int, widths: tuple[int, int], cuts: list[int], shift: float, scale: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(rows, 1))
    x, y = (torch.from_numpy(shift + scale * (common + rng.normal(size=(rows, d)))).float() for d in widths)
    expected = np.corrcoef(x.double().T, y.double().T)[: widths[0], widths[0] :]
    assert np.abs(streamed(x, y, cuts) - expected).max() < 2e-4


@pytest.mark.parametrize("constant", [0.0, 0.1, -1e4])
def test_a_constant_variable_correlates_with_nothing(constant: float) -> None:
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    x[:, 1] = constant
    found = streamed(x, x, [7, 20])
    assert not found[1].any()
    assert not found[:, 1].any()
    assert found[[0, 2], [0, 2]] == pytest.approx(1, abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 60),
    width=st.integers(1, 9),
    strip=st.sampled_from([1, 4, 512]),
    cuts=st.lists(st.integers(1, 59), max_size=6),
    shift=st.sampled_from([0.0, -30.0, 1e4]),
    seed=st.integers(0, 2**16),
)
def test_second_moments_equal_numpys_for_any_batching(
    rows: int, width: int, strip: int, cuts: list[int], shift: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(shift + rng.normal(size=(rows, width)) @ rng.normal(size=(width, width))).float()
    whole, diagonal = SecondMoments(True), SecondMoments(False)
    bounds = [0, *sorted({cut for cut in cuts if cut < rows}), rows]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(statistics, "_STRIP", strip)
        for first, last in pairwise(bounds):
            for each in (whole, diagonal):
                each.update(x[first:last])
            products = whole.products.numpy()  # asked for in between, too
    exact = x.double().numpy()
    expected = exact.T @ exact / rows
    size = np.sqrt(np.outer(expected.diagonal(), expected.diagonal()))
    assert (np.abs(products - expected) <= 1e-5 * size).all()
    for each in (whole, diagonal):
        assert each.squares.numpy() == pytest.approx(expected.diagonal(), rel=1e-5)
        assert each.mean.numpy() == pytest.approx(exact.mean(0), abs=1e-5 * np.abs(exact).max())


BOOTSTRAPS = pytest.mark.parametrize("bootstrap", [bootstrap_mean, bootstrap_median])


@BOOTSTRAPS
def test_an_interval_is_seeded_and_holds_the_value(bootstrap) -> None:
    values = np.random.default_rng(0).normal(5, 1, 80)
    interval = bootstrap(values)
    assert interval == bootstrap(values)
    assert interval != bootstrap(values, seed=1)
    assert interval.low < interval.value < interval.high
    assert interval.value == pytest.approx(np.mean(values) if bootstrap is bootstrap_mean else np.median(values))


@BOOTSTRAPS
def test_an_interval_shrinks_with_more_units(bootstrap) -> None:
    rng = np.random.default_rng(0)
    few, many = bootstrap(rng.normal(size=25)), bootstrap(rng.normal(size=1600))
    # An eighth by the square-root law; a third leaves room for chance.
    assert many.high - many.low < (few.high - few.low) / 3


@BOOTSTRAPS
def test_units_that_agree_have_no_width(bootstrap) -> None:
    assert bootstrap(np.full(9, 2.5)) == Interval(2.5, 2.5, 2.5)


@BOOTSTRAPS
def test_one_unit_says_nothing_of_its_uncertainty(bootstrap) -> None:
    found = bootstrap(np.array([4.0]))
    assert found.value == 4.0
    assert np.isnan([found.low, found.high]).all()


def test_two_units_reach_from_one_to_the_other() -> None:
    # Half of the resamples hold both, a quarter only the first, a quarter only the second.
    assert bootstrap_mean(np.array([0.0, 1.0])) == Interval(0.5, 0.0, 1.0)


def test_a_ratio_is_of_sums_and_not_a_mean_of_ratios() -> None:
    interval = bootstrap_ratio(np.array([1.0, 30.0]), np.array([1.0, 10.0]))
    assert interval.value == pytest.approx(31 / 11)
    assert (interval.low, interval.high) == (1.0, 3.0)


def test_an_interval_covers_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    intervals = [bootstrap_mean(rng.normal(size=60), replicates=400) for _ in range(200)]
    covered = np.mean([interval.low <= 0 <= interval.high for interval in intervals])
    assert 0.89 <= covered <= 0.98


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # The published examples of Newcombe (1998), to the four places given there.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilsons_interval_is_that_of_the_literature(successes: int, trials: int, low: float, high: float) -> None:
    found = wilson(successes, trials)
    assert found.value == successes / trials
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@given(trials=st.integers(1, 5000), share=st.floats(0, 1))
def test_wilsons_bounds_solve_their_equation_and_mirror_each_other(trials: int, share: float) -> None:
    successes = round(trials * share)
    found = wilson(successes, trials)
    assert 0 <= found.low <= found.value <= found.high <= 1
    for bound in (found.low, found.high):  # (p - bound)^2 = z^2 bound (1 - bound) / n
        z_squared = 1.959963984540054**2
        assert (found.value - bound) ** 2 == pytest.approx(z_squared * bound * (1 - bound) / trials, abs=1e-12)
    other = wilson(trials - successes, trials)
    assert (other.low, other.high) == (
        pytest.approx(1 - found.high, abs=1e-12),
        pytest.approx(1 - found.low, abs=1e-12),
    )


@pytest.mark.parametrize("trials", [1, 3, 7, 10, 1000, 19_000])
def test_shares_of_none_and_of_all_end_their_own_intervals(trials: int) -> None:
    z_squared = 1.959963984540054**2
    none, every = wilson(0, trials), wilson(trials, trials)
    assert (none.value, none.low) == (0.0, 0.0)
    assert (every.value, every.high) == (1.0, 1.0)
    assert none.high == pytest.approx(z_squared / (trials + z_squared))
    assert every.low == pytest.approx(trials / (trials + z_squared))
    assert none.low <= none.value <= none.high
    assert every.low <= every.value <= every.high
