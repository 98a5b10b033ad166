"""What a search for blocks to drop leaves behind: one JSON document."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from layerfold.statistics import Interval

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Candidate:
    """One set of removed blocks (or of their sublayers), measured on all of the selection text.

    Attributes:
        removed: indices, in order; empty for the model as it is.
        blocks: how many blocks are left.
        perplexity: on the selection text.
        kl: mean over its tokens of KL(model as it is || without these), in nats.
        parameters: distinct ones.
    """

    removed: tuple[int, ...]
    blocks: int
    perplexity: float
    kl: float
    parameters: int


@dataclass(frozen=True)
class Timing:
    """How fast an architecture is; candidates that remove equally many have the same.

    Attributes:
        milliseconds: a generated token, median with quartiles.
        speedup: over the model as it is, with its 95 % interval; exactly 1 for that model.
    """

    milliseconds: Interval
    speedup: Interval


@dataclass(frozen=True)
class HeldOut:
    """What a candidate scores on the test text, which took no part in choosing it.

    Attributes:
        perplexity: with its 95 % interval.
        versus_base: divided by the base's, from a paired bootstrap; exactly 1 for the base.
    """

    perplexity: Interval
    versus_base: Interval


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        model: the name of the model that was searched.
        model_sha256: hash of its weights.
        settings: all that determines the search besides the model and the text: ``part``, ``remove``, ``strategy``
            and so on.
        text: corpus, split, tokens and hashes of the selection text.
        test_text: the same of the test text.
        parts: how many of what is removed the model has.
        base: the model as it is.
        candidates: those measured on all of the selection text, by the number removed and then by what is removed.
        best: of each number removed, the one that the objective prefers.
        tests: figures on the test text of the base, under (), and of the best.
        timings: by the number removed, 0 for the base; empty where nothing was timed.
        eliminated: how many more candidates a race gave up on before it had read all of the text.
        work: how many times a candidate was scored on a window, and how many times for all candidates on all windows.
        environment: versions, threads, processor.
    """

    model: str
    model_sha256: str
    settings: dict[str, Any]
    text: dict[str, Any]
    test_text: dict[str, Any]
    parts: int
    base: Candidate
    candidates: tuple[Candidate, ...]
    best: Mapping[int, Candidate]
    tests: Mapping[tuple[int, ...], HeldOut]
    timings: Mapping[int, Timing] = field(default_factory=dict)
    eliminated: int = 0
    work: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    def perplexity_change_percent(self, candidate: Candidate) -> float:
        """Return the change of perplexity on the selection text against the base."""
        return 100 * (candidate.perplexity / self.base.perplexity - 1)

    def parameters_change_percent(self, candidate: Candidate) -> float:
        """Return the change of the number of distinct parameters against the base."""
        return 100 * (candidate.parameters / self.base.parameters - 1)

    def speed_change_percent(self, candidate: Candidate) -> float | None:
        """Return the change in milliseconds a token against the base: negative is faster."""
        timing = self.timings.get(len(candidate.removed))
        return None if timing is None else 100 * (1 / timing.speedup.value - 1)

    def to_json(self) -> dict[str, Any]:
        """Return the document that `best_drop` reads."""
        return {
            "format_version": FORMAT_VERSION,
            "search": "drop",
            "model": self.model,
            "model_sha256": self.model_sha256,
            "settings": self.settings,
            "text": self.text,
            "test_text": self.test_text,
            "parts": self.parts,
            "base": self._row(self.base),
            "candidates": [self._row(candidate) for candidate in self.candidates],
            "best": {str(removed): self._row(candidate) for removed, candidate in self.best.items()},
            "timings": {
                str(removed): {"milliseconds": _bounds(timing.milliseconds), "speedup": _bounds(timing.speedup)}
                for removed, timing in self.timings.items()
            },
            "eliminated": self.eliminated,
            "work": self.work,
            "environment": self.environment,
        }

    def _row(self, candidate: Candidate) -> dict[str, Any]:
        timing = self.timings.get(len(candidate.removed))
        test = self.tests.get(candidate.removed)
        return {
            "removed": list(candidate.removed),
            "blocks": candidate.blocks,
            "perplexity": _number(candidate.perplexity),
            "kl": _number(candidate.kl),
            "parameters": candidate.parameters,
            "milliseconds": None if timing is None else timing.milliseconds.value,
            "parameters_change_percent": self.parameters_change_percent(candidate),
            "perplexity_change_percent": _number(self.perplexity_change_percent(candidate)),
            "speed_change_percent": self.speed_change_percent(candidate),
        } | (
            {}
            if test is None
            else {"test": {"perplexity": _bounds(test.perplexity), "versus_base": _bounds(test.versus_base)}}
        )


def _bounds(interval: Interval) -> dict[str, float | None]:
    return {"value": _number(interval.value), "low": _number(interval.low), "high": _number(interval.high)}


def _number(figure: float) -> float | None:
    """JSON has no word for what is not a number or beyond all numbers."""
    return figure if math.isfinite(figure) else None
