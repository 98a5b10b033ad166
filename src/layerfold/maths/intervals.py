"""Streaming moments, and intervals that cover 95 % with few units too."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, stdtrit

Floats = NDArray[np.float64]


_TAIL = 0.025
_Z = 1.959963984540054


@dataclass(frozen=True)
class Interval:
    """An estimate with the bounds of its 95 % interval.

    Attributes:
        deviation: standard deviation over seeds, where the estimate is the mean over several.
    """

    value: float
    low: float
    high: float
    deviation: float | None = None

    def map(self, function: Callable[[float], float]) -> Interval:
        """Return the interval of what a rising function makes of the estimate."""
        return Interval(function(self.value), function(self.low), function(self.high))

    def within(self, least: float, most: float) -> Interval:
        """Return the interval without what lies outside the estimate's range."""
        low, high = (float(min(max(bound, least), most)) for bound in (self.low, self.high))
        return Interval(self.value, low, high, self.deviation)

    def to_json(self) -> dict[str, float]:
        """Return the estimate and its bounds."""
        return {"value": self.value, "low": self.low, "high": self.high}


def exponential(nats: float) -> float:
    """Return e to that power; infinity where that is beyond all numbers."""
    with np.errstate(over="ignore"):
        return float(np.exp(nats))


def ratio_interval(numerator: Floats, denominator: Floats) -> Interval:
    """Interval of sum(numerator) / sum(denominator) over independent units, as nats over the tokens of documents.

    The standard error is that of the jackknife, which leaves out one unit at a time. The quantile is Student's, with
    fewer degrees of freedom the more the units differ in size: a long document weighs as much as many short ones.
    Units without a denominator are left out. Bounds are nan where fewer than two are left, since a single unit says
    nothing of how units vary, and where the estimate is not finite.

    Args:
        numerator, denominator: (units,) each, the denominator not negative.

    Source: Bell and McCaffrey, "Bias reduction in standard errors for linear regression with multi-stage samples",
    2002 (standard error and degrees of freedom), for a regression on a constant with the denominators as weights.
    """
    there = denominator > 0
    numerator, denominator = numerator[there], denominator[there]
    total = denominator.sum()
    value = float(numerator.sum() / total)
    if len(numerator) < 2 or not math.isfinite(value):
        return Interval(value, math.nan, math.nan)
    n, weight = len(numerator), denominator / total
    left_out = (numerator - value * denominator) / (total - denominator)
    half = float(stdtrit(_freedom(weight), 1 - _TAIL) * math.sqrt((n - 1) / n * np.square(left_out).sum()))
    return Interval(value, value - half, value + half)


def _freedom(weight: Floats) -> float:
    """Degrees of freedom of the jackknife's variance, of a weighted mean of units of equal variance.

    With G the matrix of the variance as a quadratic form, (tr G)^2 / tr G^2, which is at least 1. G is
    D - w d' - d w' + (tr D) w w', with D diagonal and d its diagonal.
    """
    d = np.square(weight / (1 - weight))
    whole, squares, mixed = d.sum(), weight @ weight, weight @ d
    trace = whole - 2 * mixed + whole * squares
    of_square = (
        (1 + 2 * squares) * (d @ d)
        + 2 * mixed**2
        + (whole * squares) ** 2
        - 4 * (weight @ np.square(d))
        + 2 * whole * (np.square(weight) @ d)
        - 4 * whole * squares * mixed
    )
    return max(1.0, float(trace**2 / of_square))


def mean_interval(values: Floats) -> Interval:
    """Interval of the mean of independent values, (units,): Student's t."""
    return ratio_interval(values, np.ones(len(values)))


def median_interval(values: Floats) -> Interval:
    """Interval of the median of independent values, (units,), whatever their distribution.

    The bounds are two of the values, the nearest two that have the true median between them in 95 % of all samples. Of
    fewer than six values no two have: there the margins are 1.25 of those of the mean by Student's t, as the median's
    are where values are normally distributed.

    Source: David and Nagaraja, "Order Statistics", 2003, section 7.1.
    """
    value, n = float(np.median(values)), len(values)
    if n < 2:
        return Interval(value, math.nan, math.nan)
    inside = [rank for rank in range(n // 2) if bdtr(rank, n, 0.5) <= _TAIL]
    if not inside:
        half = float(stdtrit(n - 1, 1 - _TAIL) * values.std(ddof=1) * math.sqrt(math.pi / 2 / n))
        return Interval(value, value - half, value + half)
    ordered = np.sort(values)
    return Interval(value, float(ordered[inside[-1]]), float(ordered[-1 - inside[-1]]))


def difference_of_shares(more: int, less: int, trials: int) -> Interval:
    """Interval of (more - less) / trials, where `more` trials speak for one of two and `less` for the other.

    Source: Bonett and Price, "Adjusted Wald confidence interval for a difference of binomial proportions based on
    paired data", 2012: Wald's interval after one more trial of each kind.
    """
    value = (more - less) / trials
    one, other = ((count + 1) / (trials + 2) for count in (more, less))
    half = _Z * math.sqrt((one + other - (one - other) ** 2) / (trials + 2))
    low, high = one - other - half, one - other + half
    return Interval(value, min(low, value), max(high, value)).within(-1, 1)


def wilson(successes: int, trials: int) -> Interval:
    """Share of successes with its 95 % score interval (Wilson, 1927)."""
    share, z = successes / trials, _Z
    scale = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / scale
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / scale
    # Rounding must not put a share of 0 or 1 outside its own interval, nor a bound outside 0 ... 1.
    return Interval(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)))
