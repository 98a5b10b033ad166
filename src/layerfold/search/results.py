"""What searches find: each a JSON document."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from layerfold.checkpoint.model import Model
from layerfold.errors import InputError
from layerfold.maths.intervals import Interval
from layerfold.methods.drop import Drop, spelled

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Figures:
    """A candidate, measured on all of the selection text.

    Attributes:
        changed: indices of the blocks that differ from the model's, in order; empty for the model itself.
        perplexity: on the selection text.
        kl: mean over its tokens of KL(model || candidate), in nats; nan where not measured.
        parameters: distinct ones.
    """

    changed: tuple[int, ...]
    perplexity: float
    kl: float
    parameters: int


@dataclass(frozen=True)
class Candidate(Figures):
    """A set of removed blocks, attentions or FFNs.

    Attributes:
        blocks: how many blocks are left.
    """

    blocks: int

    @property
    def removed(self) -> tuple[int, ...]:
        """Indices of the blocks that are gone, or whose attention or FFN is."""
        return self.changed


@dataclass(frozen=True)
class Window(Figures):
    """Consecutive blocks that share their FFNs."""

    @property
    def blocks(self) -> tuple[int, ...]:
        """Indices of the blocks."""
        return self.changed

    @property
    def name(self) -> str:
        """The window as `Share` takes it, ``START:K``; empty for the model itself."""
        return f"{self.blocks[0]}:{len(self.blocks)}" if self.blocks else ""


@dataclass(frozen=True)
class Timing:
    """Latency of an architecture; candidates that remove equally many blocks have the same.

    Attributes:
        milliseconds: a generated token, median with quartiles.
        speedup: over the model, with its 95 % interval; for the model itself, of a copy of it: its interval should
            hold 1.
    """

    milliseconds: Interval
    speedup: Interval

    def to_json(self) -> dict[str, Any]:
        """Return both as JSON."""
        return {"milliseconds": bounds(self.milliseconds), "speedup": bounds(self.speedup)}


@dataclass(frozen=True)
class HeldOutScore:
    """Perplexity on the test text, which took no part in choosing.

    Attributes:
        perplexity: with its 95 % interval.
        versus_base: divided by the model's, paired over the same documents; exactly 1 for the model itself.
    """

    perplexity: Interval
    versus_base: Interval

    def to_json(self) -> dict[str, Any]:
        """Return both as JSON."""
        return {"perplexity": bounds(self.perplexity), "versus_base": bounds(self.versus_base)}


def bounds(interval: Interval) -> dict[str, float | None]:
    """Return an estimate and its bounds as JSON."""
    return {name: number(bound) for name, bound in interval.to_json().items()}


def number(figure: float) -> float | None:
    """Return a figure as JSON, which has neither nan nor infinity."""
    return figure if math.isfinite(figure) else None


R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Document(ABC, Generic[R]):
    """What a search or a plan finds: its rows are candidates, each with figures on the selection text.

    Attributes:
        model, model_sha256: the model's name, and the hash of its weights.
        base: the model itself, as a row.
        settings: all that determines the search besides the model and the text.
        text, test_text: corpus, split, tokens and hashes of the selection text and of the test text.
        environment: versions, threads, processor.
    """

    kind: ClassVar[str]
    model: str
    model_sha256: str
    base: R
    settings: dict[str, Any]
    text: dict[str, Any]
    test_text: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)

    @abstractmethod
    def test(self, row: R) -> HeldOutScore | None:
        """Return a row's score on the test text, or None where it was not measured on it."""

    def timing(self, row: R) -> Timing | None:
        """Return a row's latency, or None where it was not timed."""
        return None

    def change_percent(self, row: R, figure: str) -> float:
        """Return the change of a figure of a row, as its perplexity, against the base's."""
        return 100 * (float(getattr(row, figure)) / float(getattr(self.base, figure)) - 1)

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
            "environment": self.environment,
        }


C = TypeVar("C", bound=Figures)


@dataclass(frozen=True, kw_only=True)
class Searched(Document[C], Generic[C]):
    """What every search finds.

    Attributes:
        candidates: those measured on all of the selection text, by how many blocks they change and then by which.
        best: for each number of blocks, the candidate that the objective prefers.
        tests: scores on the test text of the base, under (), and of the best, by the blocks that they change.
        eliminated: how many more candidates a race gave up on before it had read all of the text.
        work: how many times a candidate was scored on a window of text, and how many times for all on all.
    """

    candidates: tuple[C, ...]
    best: Mapping[int, C]
    tests: Mapping[tuple[int, ...], HeldOutScore]
    eliminated: int = 0
    work: dict[str, Any] = field(default_factory=dict)

    def test(self, row: C) -> HeldOutScore | None:
        """Return a candidate's score on the test text, or None where it was not measured on it."""
        return self.tests.get(row.changed)

    def to_json(self) -> dict[str, Any]:
        """Return the document that is written."""
        return {
            **super().to_json(),
            "base": self._row(self.base),
            "candidates": [self._row(candidate) for candidate in self.candidates],
            "best": {str(number): self._row(candidate) for number, candidate in self.best.items()},
            "eliminated": self.eliminated,
            "work": self.work,
        }

    def _row(self, candidate: C) -> dict[str, Any]:
        test = self.test(candidate)
        return {
            "perplexity": number(candidate.perplexity),
            "kl": number(candidate.kl),
            "parameters": candidate.parameters,
            "parameters_change_percent": self.change_percent(candidate, "parameters"),
            "perplexity_change_percent": number(self.change_percent(candidate, "perplexity")),
            **({} if test is None else {"test": test.to_json()}),
        }


@dataclass(frozen=True, kw_only=True)
class Found(Searched[Candidate]):
    """What a search for blocks to drop found: the document that `best_drop` reads.

    Attributes:
        parts: how many blocks, attentions or FFNs the model has.
        timings: by the number removed, 0 for the base; empty where nothing was timed.
    """

    kind: ClassVar[str] = "drop"
    parts: int
    timings: Mapping[int, Timing] = field(default_factory=dict)

    def timing(self, row: Candidate) -> Timing | None:
        """Return the latency of all that removes as many, or None where nothing was timed."""
        return self.timings.get(len(row.removed))

    def speed_change_percent(self, candidate: Candidate) -> float | None:
        """Return the change in milliseconds a token against the base: negative is faster."""
        timing = self.timing(candidate)
        if timing is None:
            return None
        return 100 * (1 / timing.speedup.value - 1) if candidate.removed else 0.0  # the base's is that of its copy

    def to_json(self) -> dict[str, Any]:
        """Return the document that is written."""
        timings = {str(removed): timing.to_json() for removed, timing in self.timings.items()}
        return super().to_json() | {"parts": self.parts, "timings": timings}

    def _row(self, candidate: Candidate) -> dict[str, Any]:
        timing = self.timing(candidate)
        return {
            "removed": list(candidate.removed),
            "blocks": candidate.blocks,
            **super()._row(candidate),
            "milliseconds": None if timing is None else timing.milliseconds.value,
            "speed_change_percent": self.speed_change_percent(candidate),
        }


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
