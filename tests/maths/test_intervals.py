from __future__ import annotations

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from layerfold.maths.intervals import (
    Interval,
    difference_of_shares,
    mean_interval,
    median_interval,
    ratio_interval,
    wilson,
)
from layerfold.maths.moments import CrossMoments, SecondMoments


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
        patched.setattr("layerfold.maths.moments._STRIP", strip)
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


INTERVALS = pytest.mark.parametrize("interval", [mean_interval, median_interval])


@INTERVALS
def test_an_interval_holds_the_value_and_shrinks_with_more_units(interval) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(5, 1, 80)
    found, few, many = interval(values), interval(rng.normal(size=25)), interval(rng.normal(size=1600))
    assert found.low < found.value < found.high
    assert found.value == pytest.approx(np.mean(values) if interval is mean_interval else np.median(values))
    # An eighth by the square-root law; a third leaves room for chance.
    assert many.high - many.low < (few.high - few.low) / 3


@INTERVALS
@pytest.mark.parametrize("units", [3, 9])
def test_units_that_agree_have_no_width(interval, units: int) -> None:
    assert interval(np.full(units, 2.5)) == Interval(2.5, 2.5, 2.5)


@INTERVALS
def test_one_unit_says_nothing_of_its_uncertainty(interval) -> None:
    found = interval(np.array([4.0]))
    assert found.value == 4.0
    assert np.isnan([found.low, found.high]).all()


@given(values=st.lists(st.floats(-100, 100), min_size=2, max_size=30))
def test_the_interval_of_a_mean_is_students(values: list[float]) -> None:
    found = mean_interval(np.array(values))
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    assert found.value - found.low == pytest.approx(half, rel=1e-6, abs=1e-9)
    assert found.high - found.value == pytest.approx(half, rel=1e-6, abs=1e-9)


def test_a_ratio_is_of_sums_and_not_a_mean_of_ratios() -> None:
    assert ratio_interval(np.array([1.0, 30.0]), np.array([1.0, 10.0])).value == pytest.approx(31 / 11)


@given(sizes=st.lists(st.floats(0.1, 50), min_size=2, max_size=12))
def test_a_ratios_interval_is_the_jackknifes_with_fewer_degrees_of_freedom(sizes: list[float]) -> None:
    tokens = np.array(sizes)
    nats = tokens * np.random.default_rng(len(sizes)).normal(4, 1, len(sizes))
    n, weight = len(sizes), tokens / tokens.sum()
    without = np.array([np.delete(nats, i).sum() / np.delete(tokens, i).sum() for i in range(n)])
    error = np.sqrt((n - 1) / n * np.square(without - nats.sum() / tokens.sum()).sum())
    # The variance is r' G r, of the rates r: its degrees of freedom are (tr G)^2 / tr G^2.
    residual = np.eye(n) - np.outer(np.ones(n), weight)
    form = residual.T @ np.diag(np.square(weight / (1 - weight))) @ residual
    freedom = np.trace(form) ** 2 / np.trace(form @ form)
    assert 1 - 1e-4 < freedom < n - 1 + 1e-4
    found = ratio_interval(nats, tokens)
    assert found.high - found.value == pytest.approx(stats.t.ppf(0.975, freedom) * error, rel=1e-4)
    assert found.value - found.low == pytest.approx(found.high - found.value, rel=1e-6)


def test_units_without_tokens_do_not_count() -> None:
    some = ratio_interval(np.array([1.0, 5.0, 0.0]), np.array([1.0, 2.0, 0.0]))
    assert some == ratio_interval(np.array([1.0, 5.0]), np.array([1.0, 2.0]))
    assert np.isnan(ratio_interval(np.array([1.0, 0.0]), np.array([1.0, 0.0])).low)


def test_a_figure_that_is_not_finite_has_no_bounds() -> None:
    found = ratio_interval(np.array([np.inf, 1.0, 2.0]), np.ones(3))
    assert found.value == np.inf
    assert np.isnan([found.low, found.high]).all()


@pytest.mark.parametrize(
    ("n", "rank"),
    # Ranks of the bounds by the table of order statistics for the 95 % interval of a median.
    [(6, 1), (8, 1), (9, 2), (12, 3), (20, 6), (50, 18)],
)
def test_the_bounds_of_a_median_are_the_tables_order_statistics(n: int, rank: int) -> None:
    values = np.random.default_rng(n).permutation(n) + 1.0
    found = median_interval(values)
    assert (found.low, found.high) == (rank, n + 1 - rank)


def documents(rng: np.random.Generator, units: int) -> tuple[np.ndarray, np.ndarray]:
    """Nats and tokens of documents of very different lengths, whose mean is exactly 4 a token."""
    tokens = np.round(np.exp(rng.normal(5.4, 0.9, units))) + 2
    return tokens * rng.normal(4, 0.3, units) + np.sqrt(tokens) * rng.normal(0, 2.7, units), tokens


RATIO = [(units, lambda rng, n: ratio_interval(*documents(rng, n)), 4) for units in (4, 8, 16, 32, 64)]
MEDIAN = [(units, lambda rng, n: median_interval(rng.normal(size=n)), 0) for units in (3, 5, 6, 12)]


@pytest.mark.parametrize(("units", "interval", "value"), RATIO + MEDIAN)
def test_intervals_cover_what_they_say_with_few_units_too(units: int, interval, value: float) -> None:
    rng = np.random.default_rng(units)
    intervals = [interval(rng, units) for _ in range(1500)]
    assert 0.935 <= np.mean([each.low <= value <= each.high for each in intervals]) <= 0.99


def test_intervals_of_25_000_texts_take_little_memory() -> None:
    values = np.random.default_rng(0).random(25_000)
    tracemalloc.start()
    mean_interval(values)
    median_interval(values)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * values.nbytes


def test_a_difference_of_shares_is_the_literatures() -> None:
    # Bonett and Price: p = (count + 1) / (n + 2), then Wald's interval.
    found = difference_of_shares(12, 3, 50)
    assert found.value == pytest.approx(0.18)
    assert (found.low, found.high) == (pytest.approx(0.0247, abs=5e-4), pytest.approx(0.3214, abs=5e-4))


@pytest.mark.parametrize(("more", "less", "trials"), [(0, 0, 50), (50, 0, 50), (1, 0, 1), (0, 7, 1000)])
def test_a_difference_of_shares_is_never_certain_and_holds_the_value(more: int, less: int, trials: int) -> None:
    found = difference_of_shares(more, less, trials)
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert found.low < found.high


@pytest.mark.parametrize("discordant", [0.01, 0.1])
def test_a_difference_of_shares_covers_what_it_says(discordant: float) -> None:
    rng = np.random.default_rng(0)
    counts = rng.multinomial(200, [0.75 * discordant, 0.25 * discordant, 1 - discordant], size=2000)
    found = [difference_of_shares(int(more), int(less), 200) for more, less, _ in counts]
    assert np.mean([each.low <= discordant / 2 <= each.high for each in found]) >= 0.935


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moments_of_half_precision_are_taken_in_float32(dtype: torch.dtype) -> None:
    x = (300 * torch.randn(400, 3, generator=torch.Generator().manual_seed(0))).to(dtype)  # squares overflow float16
    moments, both = SecondMoments(True), CrossMoments()
    moments.update(x)
    both.update(x, x)
    exact = x.double()
    assert torch.allclose(moments.products.double(), exact.T @ exact / 400, rtol=1e-5)
    assert np.abs(both.correlation().numpy() - np.corrcoef(exact.T)).max() < 1e-4


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
    assert none.value == none.low == 0.0 <= none.high == pytest.approx(z_squared / (trials + z_squared))
    assert every.value == every.high == 1.0 >= every.low == pytest.approx(trials / (trials + z_squared))
