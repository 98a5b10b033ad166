"""What a search leaves behind, one JSON document; and what a search for blocks to drop does."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from layerfold.checkpoint.model import Model
from layerfold.errors import InputError
from layerfold.maths.intervals import Interval
from layerfold.methods.drop import Drop, spelled

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

    @property
    def changed(self) -> tuple[int, ...]:
        """The blocks that it has otherwise than the model: those removed."""
        return self.removed


@dataclass(frozen=True)
class Timing:
    """How fast an architecture is; candidates that remove equally many have the same.

    Attributes:
        milliseconds: a generated token, median with quartiles.
        speedup: over the model as it is, with its 95 % interval; for that model, of a copy of it: its interval should
            hold 1.
    """

    milliseconds: Interval
    speedup: Interval


@dataclass(frozen=True)
class HeldOut:
    """What a candidate scores on the test text, which took no part in choosing it.

    Attributes:
        perplexity: with its 95 % interval.
        versus_base: divided by the base's, paired over the same documents; exactly 1 for the base.
    """

    perplexity: Interval
    versus_base: Interval


class Figures(Protocol):
    """What is measured of every candidate, whatever the search is for."""

    @property
    def changed(self) -> tuple[int, ...]:
        """Indices of the blocks that it has otherwise than the model; none for the model as it is."""

    @property
    def perplexity(self) -> float:
        """On the selection text."""

    @property
    def kl(self) -> float:
        """Mean over its tokens of KL(model as it is || candidate), in nats; nan where not measured."""

    @property
    def parameters(self) -> int:
        """How many distinct ones."""


C = TypeVar("C", bound=Figures)


@dataclass(frozen=True, kw_only=True)
class Searched(Generic[C]):
    """What every search finds.

    Attributes:
        model: the name of the model that was searched.
        model_sha256: hash of its weights.
        settings: all that determines the search besides the model and the text.
        text: corpus, split, tokens and hashes of the selection text.
        test_text: the same of the test text.
        base: the model as it is.
        candidates: those measured on all of the selection text, by how many blocks they change and then by which.
        best: of each number of blocks, the one that the objective prefers.
        tests: figures on the test text of the base, under (), and of the best, by the blocks that they change.
        eliminated: how many more candidates a race gave up on before it had read all of the text.
        work: how many times a candidate was scored on a window of text, and how many times for all on all.
        environment: versions, threads, processor.
    """

    kind: ClassVar[str]
    model: str
    model_sha256: str
    settings: dict[str, Any]
    text: dict[str, Any]
    test_text: dict[str, Any]
    base: C
    candidates: tuple[C, ...]
    best: Mapping[int, C]
    tests: Mapping[tuple[int, ...], HeldOut]
    eliminated: int = 0
    work: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    def test(self, candidate: C) -> HeldOut | None:
        """Return its figures on the test text, or None where it was not measured on it."""
        return self.tests.get(candidate.changed)

    def perplexity_change_percent(self, candidate: C) -> float:
        """Return the change of perplexity on the selection text against the base."""
        return 100 * (candidate.perplexity / self.base.perplexity - 1)

    def parameters_change_percent(self, candidate: C) -> float:
        """Return the change of the number of distinct parameters against the base."""
        return 100 * (candidate.parameters / self.base.parameters - 1)

    def to_json(self) -> dict[str, Any]:
        """Return the document that is written."""
        return {
            "format_version": FORMAT_VERSION,
            "search": self.kind,
            "model": self.model,
            "model_sha256": self.model_sha256,
            "settings": self.settings,
            "text": self.text,
            "test_text": self.test_text,
            "base": self._row(self.base),
            "candidates": [self._row(candidate) for candidate in self.candidates],
            "best": {str(number): self._row(candidate) for number, candidate in self.best.items()},
            "eliminated": self.eliminated,
            "work": self.work,
            "environment": self.environment,
        }

    def _row(self, candidate: C) -> dict[str, Any]:
        row: dict[str, Any] = {
            "perplexity": number(candidate.perplexity),
            "kl": number(candidate.kl),
            "parameters": candidate.parameters,
            "parameters_change_percent": self.parameters_change_percent(candidate),
            "perplexity_change_percent": number(self.perplexity_change_percent(candidate)),
        }
        test = self.test(candidate)
        if test is not None:
            row["test"] = {"perplexity": bounds(test.perplexity), "versus_base": bounds(test.versus_base)}
        return row


@dataclass(frozen=True, kw_only=True)
class Found(Searched[Candidate]):
    """What a search for blocks to drop found: the document that `best_drop` reads.

    Attributes:
        parts: how many of what is removed the model has.
        timings: by the number removed, 0 for the base; empty where nothing was timed.
    """

    kind: ClassVar[str] = "drop"
    parts: int
    timings: Mapping[int, Timing] = field(default_factory=dict)

    def speed_change_percent(self, candidate: Candidate) -> float | None:
        """Return the change in milliseconds a token against the base: negative is faster."""
        timing = self.timings.get(len(candidate.removed))
        if timing is None:
            return None
        return 100 * (1 / timing.speedup.value - 1) if candidate.removed else 0.0  # the base's is that of its copy

    def to_json(self) -> dict[str, Any]:
        """Return the document that is written."""
        timings = {
            str(removed): {"milliseconds": bounds(timing.milliseconds), "speedup": bounds(timing.speedup)}
            for removed, timing in self.timings.items()
        }
        return super().to_json() | {"parts": self.parts, "timings": timings}

    def _row(self, candidate: Candidate) -> dict[str, Any]:
        timing = self.timings.get(len(candidate.removed))
        return {
            "removed": list(candidate.removed),
            "blocks": candidate.blocks,
            **super()._row(candidate),
            "milliseconds": None if timing is None else timing.milliseconds.value,
            "speed_change_percent": self.speed_change_percent(candidate),
        }


def bounds(interval: Interval) -> dict[str, float | None]:
    """Return an estimate and its bounds as JSON."""
    return {"value": number(interval.value), "low": number(interval.low), "high": number(interval.high)}


def number(figure: float) -> float | None:
    """Return a figure as JSON, which has no word for what is not a number or beyond all numbers."""
    return figure if math.isfinite(figure) else None


@dataclass(frozen=True)
class Window:
    """Consecutive blocks that share their FFNs, measured on all of the selection text.

    Attributes:
        blocks: indices, in order; empty for the model as it is.
        perplexity: on the selection text.
        kl: mean over its tokens of KL(model as it is || with this window shared), in nats; nan where not measured.
        parameters: distinct ones.
    """

    blocks: tuple[int, ...]
    perplexity: float
    kl: float
    parameters: int

    @property
    def changed(self) -> tuple[int, ...]:
        """The blocks that it has otherwise than the model: all of the window."""
        return self.blocks

    @property
    def name(self) -> str:
        """The window as `Share` takes it, ``START:K``; empty for the model as it is."""
        return f"{self.blocks[0]}:{len(self.blocks)}" if self.blocks else ""


@dataclass(frozen=True, kw_only=True)
class FoundWindows(Searched[Window]):
    """What a search for a window to share found; ``best`` is by how many blocks share."""

    kind: ClassVar[str] = "window"

    def _row(self, window: Window) -> dict[str, Any]:
        return {"window": window.name, "blocks": list(window.blocks), **super()._row(window)}


def best_drop(file: Path, model: Model, remove: int | None = None, *, repaired: bool = True) -> Drop:
    """Return the drop that a search found best for a model.

    Args:
        file: what `DropSearch` or ``layerfold search drop --json`` wrote.
        model: the one that was searched.
        remove: how many blocks; None where the search tells of one number only.
        repaired: whether a repair will follow, which a search for what is best with one takes for granted.

    Raises:
        InputError: the file is none of those, or of another model, or does not tell of that number.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        version, sha256, part = document["format_version"], document["model_sha256"], document["settings"]["part"]
        best = {int(count): spelled(row["removed"]) for count, row in document["best"].items()}
        if document["search"] != "drop":
            raise ValueError("not a search for what to drop")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise InputError(f"search file {str(file)!r} cannot be read ({reason}); accepted: a search.json") from error
    if version != FORMAT_VERSION:
        raise InputError(f"search file {str(file)!r} is of version {version!r}; accepted: {FORMAT_VERSION}")
    if sha256 != model.sha256:
        raise InputError(
            f"search file {str(file)!r} is of another model: weights {str(sha256)[:12]}... ({document.get('model')}), "
            f"these are {model.sha256[:12]}... ({model.name})"
        )
    if not repaired and document["settings"].get("objective") == "repaired":
        raise InputError(
            f"search file {str(file)!r} tells what is best to drop before a repair, and none is to follow; accepted: "
            "repair refit+attention, or another search"
        )
    if remove is None and len(best) == 1:
        (remove,) = best
    if remove not in best:
        accepted = ", ".join(map(str, sorted(best))) or "none"
        raise InputError(f"remove {remove}; accepted: what the search {str(file)!r} tells of: {accepted}")
    return Drop(blocks=best[remove], part=part)
