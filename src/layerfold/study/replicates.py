"""The same study with several seeds -> means and deviations."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from scipy.special import stdtrit

from layerfold.files import Json, hash_json
from layerfold.records import Record, Results


def combined(recipe: dict[str, Json], by_seed: Mapping[int, Results]) -> Results:
    """Return one study's results of those with each seed; what is measured with some seeds alone is left out.

    A figure that depends on the seed is the mean over seeds, with the mean's own 95 % interval, beside its
    ``deviation``, the sample standard deviation, and the values ``by_seed``. What cannot be averaged, as text, is
    the first seed's; seeds themselves are listed.

    The interval has two parts, whose margins add up in squares: over seeds Student's t of the mean, and over documents
    the mean of the seeds' own margins, since all of them read the same documents. (Zou and Donner, "Construction of
    confidence limits about effect measures", 2008, for sums of independent parts. Here the seeds' scatter holds
    a part of the other, so that the interval is rather too wide than too narrow.)
    """
    first, *others = by_seed.values()
    if not others:
        return first
    shared = [place for place in first.records if all(place in other.records for other in others)]
    records = {place: _combined([each.records[place] for each in by_seed.values()], list(by_seed)) for place in shared}
    return replace(first, recipe=recipe, records=records)


def _combined(records: Sequence[Record], seeds: Sequence[int]) -> Record:
    keys = [record.key for record in records]
    if len(set(keys)) == 1:
        return records[0]
    return replace(
        records[0],
        key=hash_json(keys),
        score=_mean([record.score for record in records]),
        subject={**records[0].subject, "records_by_seed": dict(zip(map(str, seeds), keys, strict=True))},
        seconds=sum(record.seconds for record in records),
    )


def _mean(scores: Sequence[Mapping[str, Any]], share: bool = False) -> dict[str, Any]:
    """The mean of scores, or of parts of them, that have the same keys.

    Args:
        share: whether they are parts of scores that are at most 1.
    """
    share = share or scores[0].get("unit") in _SHARES
    found = {key: _mean_of([score.get(key) for score in scores], share) for key in scores[0]}
    seeds = [score.get("seed") for score in scores]
    if len(set(seeds)) > 1:
        found["seed"] = seeds
    values = [score["value"] for score in scores if isinstance(score.get("value"), int | float)]
    if len(values) == len(scores):
        deviation = _deviation(values)
        found |= {"deviation": deviation, "by_seed": values}
        bounds = [(score["low"], score["high"]) for score in scores if {"low", "high"} <= score.keys()]
        estimated = bounds and None not in chain(*bounds)
        if estimated and all(score.get("interval") != "quartiles" for score in scores):
            low, high = _bounds(values, bounds, deviation)
            found |= {"low": low, "high": min(high, 1.0) if share else high}
    return found


_SHARES = ("accuracy", "ROUGE-L", "repeated 4-grams")
"""Units of figures that are at most 1."""


def _bounds(values: Sequence[float], bounds: Sequence[tuple[float, float]], deviation: float) -> tuple[float, float]:
    """Bounds of the mean of values over seeds, from each seed's own."""
    mean, n = statistics.fmean(values), len(values)
    margin = float(stdtrit(n - 1, 0.975)) * deviation / math.sqrt(n)
    low = mean - math.hypot(margin, mean - statistics.fmean(low for low, _ in bounds))
    high = mean + math.hypot(margin, statistics.fmean(high for _, high in bounds) - mean)
    # What cannot be negative, as a perplexity or a share, is not said to be.
    return max(low, 0.0) if all(least >= 0 for least, _ in bounds) else low, high


def _deviation(values: Sequence[float]) -> float:
    """The sample standard deviation; nan where a value, as a broken model's perplexity, is not finite."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def _mean_of(values: Sequence[Any], share: bool) -> Any:
    if any(value is None for value in values):
        return None
    if all(isinstance(value, Mapping) for value in values):
        return _mean(values, share)
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if not numbers or len(set(values)) == 1:
        return values[0]
    return statistics.fmean(values)
