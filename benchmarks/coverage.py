"""How often 95 % intervals hold the true figure, on made-up measurements whose true figure is known."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit
from shape import Figures, arguments, report

from layerfold.maths.intervals import (
    Interval,
    difference_of_shares,
    mean_interval,
    median_interval,
    ratio_interval,
    wilson,
)
from layerfold.records import Record, Results
from layerfold.study.replicates import combined

Floats = NDArray[np.float64]
Documents = tuple[Floats, Floats]
"""Nats and tokens, (documents,) each."""

NUMBERS = (4, 8, 16, 32, 64)
_TOKEN, _DOCUMENT = 2.7, 0.3
"""Standard deviations of a token's nats within a document, and of the documents' means, as pocket's on reviews."""


def _scored(tokens: Floats, means: Floats, rng: np.random.Generator) -> Documents:
    tokens = np.maximum(2, np.round(tokens))
    return tokens * means + np.sqrt(tokens) * rng.normal(0, _TOKEN, len(tokens)), tokens


def review(n: int, rng: np.random.Generator) -> Documents:
    """Lengths, and means of nats, of documents like reviews: the long ones have fewer nats a token."""
    lengths = rng.normal(0, 0.65, n)
    return 220 * np.exp(lengths), 4 - 0.05 * lengths + rng.normal(0, _DOCUMENT, n)


def reviews(n: int, rng: np.random.Generator) -> Documents:
    """Documents like reviews."""
    return _scored(*review(n, rng), rng)


def equal(n: int, rng: np.random.Generator) -> Documents:
    """Documents of one length."""
    return _scored(np.full(n, 250.0), rng.normal(4, _DOCUMENT, n), rng)


def heavy(n: int, rng: np.random.Generator) -> Documents:
    """As reviews, with means of Student's t at 3 degrees of freedom: some are far from all others."""
    return _scored(review(n, rng)[0], 4 + _DOCUMENT * rng.standard_t(3, n) / 3**0.5, rng)


def skewed(n: int, rng: np.random.Generator) -> Documents:
    """As reviews, with a skewed distribution of means: a few are much harder."""
    return _scored(review(n, rng)[0], 3 + np.exp(rng.normal(0, 0.6, n)), rng)


def unequal(n: int, rng: np.random.Generator) -> Documents:
    """A tenth of the documents holds half of the tokens."""
    lengths = rng.normal(0, 1.3, n)
    return _scored(150 * np.exp(lengths), 4 - 0.1 * lengths + rng.normal(0, _DOCUMENT, n), rng)


TEXTS: dict[str, Callable[[int, np.random.Generator], Documents]] = {
    "equal lengths": equal,
    "reviews": reviews,
    "heavy tails": heavy,
    "skewed": skewed,
    "very unequal lengths": unequal,
}


def percentile(numerator: Floats, denominator: Floats, rng: np.random.Generator, replicates: int = 300) -> Interval:
    """The interval of perplexity-1: a percentile bootstrap."""
    chosen = rng.integers(0, len(numerator), (replicates, len(numerator)))
    low, high = np.quantile(numerator[chosen].sum(1) / denominator[chosen].sum(1), [0.025, 0.975])
    return Interval(float(numerator.sum() / denominator.sum()), float(low), float(high))


def students(numerator: Floats, denominator: Floats) -> Interval:
    """Student's t with n - 1 degrees of freedom and the standard error of the delta method."""
    n, value = len(numerator), float(numerator.sum() / denominator.sum())
    error = np.sqrt(np.square((numerator - value * denominator) / denominator.sum()).sum() * n / (n - 1))
    half = float(stdtrit(n - 1, 0.975) * error)
    return Interval(value, value - half, value + half)


def windows(size: int, n: int, rng: np.random.Generator) -> Documents:
    """Nats and tokens of n windows that a stream of reviews is cut into."""
    means: list[Floats] = []
    while sum(map(len, means)) < n * size:
        length, mean = review(1, rng)
        means.append(np.full(max(2, round(float(length[0]))), mean[0]))
    sums = np.concatenate(means)[: n * size].reshape(n, size).sum(1)
    return sums + np.sqrt(size) * rng.normal(0, _TOKEN, n), np.full(n, float(size))


def coverage(make: Callable[[], Interval], truth: float, trials: int) -> float:
    """Share of intervals that hold the truth."""
    found = [make() for _ in range(trials)]
    return float(np.mean([each.low <= truth <= each.high for each in found]))


def _measured(
    interval: Callable[[Floats, Floats], Interval],
    text: Callable[[int, np.random.Generator], Documents],
    n: int,
    rng: np.random.Generator,
) -> Interval:
    return interval(*text(n, rng))


def of_perplexity(trials: int) -> Figures:
    """Coverage by text, by interval and by the number of documents."""
    figures = {}
    for name, text in TEXTS.items():
        rng = np.random.default_rng(0)
        nats, tokens = text(2_000_000, rng)
        truth = float(nats.sum() / tokens.sum())
        for n in NUMBERS:
            for way, interval in (
                ("layerfold", ratio_interval),
                ("t", students),
                ("bootstrap", partial(percentile, rng=rng)),
            ):
                make = partial(_measured, interval, text, n, rng)
                figures[f"{name}, {n} documents, {way}"] = coverage(make, truth, trials)
    return figures


def of_windows(trials: int) -> Figures:
    """Coverage of a bootstrap over windows of reviews, by tokens a window and by the number of windows."""
    rng = np.random.default_rng(0)
    nats, tokens = _scored(*review(2_000_000, rng), rng)
    truth = float(nats.sum() / tokens.sum())
    return {
        f"reviews, {n} windows of {size}, bootstrap": coverage(
            lambda size=size, n=n: percentile(*windows(size, n, rng), rng), truth, trials
        )
        for size in (32, 256)
        for n in NUMBERS
    }


def of_others(trials: int) -> Figures:
    """Coverage of the other intervals at their usual numbers."""
    rng = np.random.default_rng(0)

    def speedup(rounds: int) -> Interval:
        return median_interval(0.03 * rng.standard_t(2, rounds))  # rounds that something disturbed are far off

    def score() -> Interval:
        return mean_interval(rng.beta(2, 8, 100)).within(0, 1)

    def repeated() -> Interval:
        return mean_interval(rng.beta(1, 2, 8)).within(0, 1)

    def accuracy() -> Interval:
        return wilson(int(rng.binomial(1000, 0.83)), 1000)

    def difference() -> Interval:
        more, less, _ = rng.multinomial(1000, [0.04, 0.02, 0.94])
        return difference_of_shares(int(more), int(less), 1000)

    return {
        "speed-up, median of 12 rounds": coverage(lambda: speedup(12), 0, trials),
        "speed-up, median of 5 rounds": coverage(lambda: speedup(5), 0, trials),
        "repeated 4-grams, mean of 8 prompts": coverage(repeated, 1 / 3, trials),
        "ROUGE, mean of 100 documents": coverage(score, 0.2, trials),
        "accuracy, 1,000 texts": coverage(accuracy, 0.83, trials),
        "difference of accuracies, 1,000 texts": coverage(difference, 0.02, trials),
        **{
            f"mean over 3 seeds, 100 documents, seeds vary {words}": coverage(
                lambda spread=spread: over_seeds(spread, rng),
                4,
                trials,
            )
            for spread, words in ((0.0, "not"), (0.03, "as documents do"), (0.3, "ten times as much"))
        },
    }


def over_seeds(spread: float, rng: np.random.Generator, seeds: int = 3, documents: int = 100) -> Interval:
    """The interval of a mean over seeds, whose documents are the same.

    Args:
        spread: standard deviation of the seeds' true figures; that of a mean over the documents is 0.03.
    """
    own = rng.normal(4, _DOCUMENT, documents)
    results = {}
    for seed in range(seeds):
        found = mean_interval(own + rng.normal(0, spread) + rng.normal(0, 0.1, documents))
        record = Record(str(seed), "row", "figure", "figure-1", found.to_json(), {}, {}, {}, 0.0)
        results[seed] = Results("base", {}, ("row",), ("figure",), {("row", "figure"): record})
    score: dict[str, Any] = combined({}, results).records["row", "figure"].score
    return Interval(score["value"], score["low"], score["high"])


def main() -> None:
    options = arguments(__doc__)
    trials = 200 if options.quick else 2000
    report("coverage", of_perplexity(trials) | of_windows(trials) | of_others(trials), options.json)


if __name__ == "__main__":
    main()
