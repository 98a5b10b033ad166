"""The columns of every search and plan, and the words for what searches change."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, TypeVar

from layerfold.maths.intervals import Interval
from layerfold.report import numerals
from layerfold.report.report import DASH, MISSING, TIMES_BASE, Column, certain, same_model
from layerfold.search.results import Candidate, Figures, Found, Searched, Timing, Window

NONE = "none"
NOUNS = {"attention": "attention layer", "ffn": "FFN"}
"""What a search removes, by its ``part``; blocks otherwise."""

Row = TypeVar("Row", bound=Figures)


def removed(candidate: Candidate) -> str:
    """Write what is removed, as the published tables do."""
    return " ".join(map(str, candidate.removed)) or NONE


def condensed(candidate: Candidate) -> str:
    """Write what is removed in little room: of three or more in a row, the first and the last."""
    parts = []
    for _, run in groupby(enumerate(candidate.removed), key=lambda each: each[1] - each[0]):
        indices = [str(index) for _, index in run]
        parts.append(DASH.join((indices[0], indices[-1])) if len(indices) > 2 else " ".join(indices))
    return " ".join(parts)


def noun(found: Found) -> str:
    """Return the word for one of what the search removes."""
    return NOUNS.get(str(found.settings.get("part")), "block")


def left(found: Found, candidate: Candidate) -> int:
    """Return how many are left of what the search removes; without attention, say, all blocks are left."""
    return found.parts - len(candidate.removed)


def name(window: Window) -> str:
    """Write a window as a recipe takes it."""
    return window.name or NONE


def spanned(window: Window) -> str:
    """Write the first and the last block of a window."""
    return f"{window.blocks[0]}{DASH}{window.blocks[-1]}" if window.blocks else ""


def best(found: Searched[Row]) -> list[Row]:
    """Return the best of each number of blocks changed, the fewest first; the base is none of them."""
    return [found.best[number] for number in sorted(found.best) if number]


def ratio(found: Searched[Row], candidate: Row) -> float:
    """Return the perplexity on the selection text divided by the base's."""
    return candidate.perplexity / found.base.perplexity


def ranked(found: Searched[Any], candidates: Sequence[Row]) -> list[Row]:
    """Return candidates by what the search compared them by, the best first, and what is not a number last."""
    objective = "kl" if found.settings.get("objective") == "kl" else "perplexity"

    def rank(candidate: Row) -> tuple[bool, float]:
        figure = getattr(candidate, objective)
        return math.isnan(figure), figure

    return sorted(candidates, key=rank)


def described(text: Mapping[str, Any]) -> str:
    """Write which text was read: ``movie-reviews train, 65,536 tokens``."""
    corpus = " ".join(str(text[key]) for key in ("corpus", "split") if text.get(key))
    tokens = text.get("tokens")
    return ", ".join(filter(None, (corpus, f"{tokens:,} tokens" if isinstance(tokens, int) else ""))) or MISSING


def timing_check(base: Timing | None) -> str:
    """Say how far the base and a copy of it came out apart; nothing where neither was timed, or the base alone."""
    return "" if base is None or base.speedup == certain(1.0) else same_model([base.speedup])


def exactly(key: str) -> Callable[[Any, Any], Interval]:
    """Return what reads a figure of a candidate that has no bounds."""
    return lambda found, candidate: certain(getattr(candidate, key))


def _changed(key: str) -> Callable[[Any, Any], Interval]:
    """Return what reads the change of a figure against the base's, in percent."""
    return lambda found, candidate: certain(100 * (getattr(candidate, key) / getattr(found.base, key) - 1))


def _speed_change(found: Found, candidate: Candidate) -> Interval | None:
    change = found.speed_change_percent(candidate)
    return None if change is None else certain(change)


def _timing(key: str) -> Callable[[Any, Any], Interval | None]:
    return lambda found, candidate: getattr(found.timings.get(len(candidate.removed)), key, None)


def _test(key: str) -> Callable[[Any, Any], Interval | None]:
    return lambda found, candidate: getattr(found.test(candidate), key, None)


BLOCKS = Column("blocks", "", "how many blocks it has", exactly("blocks"), numerals.whole, name="blocks")
PERPLEXITY = Column(
    "perplexity", "", "perplexity on the selection text", exactly("perplexity"), numerals.precise, "lower",
    name="perplexity",
)  # fmt: skip
KL = Column(
    "KL", "nats", "mean divergence from the base's next-token distribution, on the selection text", exactly("kl"),
    numerals.significant, "lower", name="kl",
)  # fmt: skip
PARAMETERS = Column(
    "parameters", "", "distinct parameters: a shared tensor counts once", exactly("parameters"), numerals.count,
    "lower", name="parameters",
)  # fmt: skip
PARAMETERS_CHANGE = Column(
    "parameters", "change", "distinct parameters against the base's", _changed("parameters"), numerals.change, "lower",
    name="parameters_change_percent",
)  # fmt: skip
REMOVED = Column(
    "removed", "of the base", "share of the base's distinct parameters that is gone",
    lambda found, candidate: certain(1 - candidate.parameters / found.base.parameters), numerals.percent, "higher",
)  # fmt: skip
RATIO = Column(
    "perplexity", TIMES_BASE, "perplexity on the selection text divided by the base's",
    lambda found, candidate: certain(ratio(found, candidate)), numerals.times, "lower",
)  # fmt: skip
PERPLEXITY_CHANGE = Column(
    "perplexity", "change", "perplexity on the selection text against the base's", _changed("perplexity"),
    numerals.change, "lower", name="perplexity_change_percent",
)  # fmt: skip
SPEED_CHANGE = Column(
    "latency", "change", "time per token against the base's, the median of paired rounds: less than zero is faster",
    _speed_change, numerals.change, "lower", name="speed_change_percent",
)  # fmt: skip
MILLISECONDS = Column(
    "latency", "ms/token", "median time per generated token, with its quartiles", _timing("milliseconds"),
    numerals.significant, "lower", interval=True, group="latency", name="milliseconds",
)  # fmt: skip
SPEEDUP = Column(
    "speed-up", TIMES_BASE, "how many times faster than the base, with its 95% interval; of the base, a copy of it",
    _timing("speedup"), numerals.times, "higher", interval=True, group="latency", name="speedup",
)  # fmt: skip
TEST_PERPLEXITY = Column(
    "perplexity", "test", "perplexity on the test text, with its 95% interval over documents", _test("perplexity"),
    numerals.precise, "lower", interval=True, group="test", name="test_perplexity",
)  # fmt: skip
TEST_RATIO = Column(
    "perplexity", f"test, {TIMES_BASE}",
    "perplexity on the test text divided by the base's, with its 95% interval, paired over the same documents",
    _test("versus_base"), numerals.times, "lower", interval=True, group="test", name="test_versus_base",
)  # fmt: skip
