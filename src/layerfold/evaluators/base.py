"""What all evaluators are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol, Self, cast, runtime_checkable

from layerfold.checkpoint.model import Model
from layerfold.errors import InputError, one_of
from layerfold.progress import Progress
from layerfold.settings import settings_of
from layerfold.text.corpora import Corpus

Protocols = Literal["sound", "published"]
PROTOCOLS: tuple[Protocols, ...] = ("sound", "published")


@dataclass(frozen=True)
class Score:
    """A figure with its uncertainty and what it was measured on.

    Attributes:
        value: the figure, in `unit`.
        low, high: its interval; equal to the value where it is exact.
        details: JSON that the evaluator adds.
    """

    value: float
    low: float
    high: float
    unit: str
    lower_is_better: bool
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return one flat JSON object."""
        return {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "unit": self.unit,
            "lower_is_better": self.lower_is_better,
            **self.details,
        }


class Evaluator(Protocol):
    """A way to measure a model; a frozen dataclass whose fields are its settings.

    An evaluator needs a `name` and a call. What else a study asks has a default here, or is a protocol below.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Raised when the same model comes to another figure, so that kept records are measured again."""
    cost: ClassVar[float] = 0.0
    """How long it takes for an estimate, where building a variant and measuring the usual evaluators takes 3."""
    before_recovery: ClassVar[bool] = False
    """Whether a study that recovers its variants measures this before as well as after."""

    @property
    def protocol_id(self) -> str:
        """Name and version of the protocol; a changed protocol has a new version."""
        return f"{self.name}-{self.version}"

    def settings(self, model: Model) -> dict[str, Any]:
        """Return all that determines the figure besides the model, defaults resolved, as JSON."""
        return settings_of(self)

    def asked(self, text: Mapping[str, Any], protocol: Protocols) -> Self:
        """Return the evaluator with a text, if it has a setting ``corpus``, and a protocol, if it has that setting.

        Args:
            text: settings ``corpus``, ``split`` and ``limit_tokens``.
        """
        known = getattr(self, "__dataclass_fields__", {})
        given = {**(text if "corpus" in known else {}), "protocol": protocol}
        changed = {name: value for name, value in given.items() if name in known}
        return replace(cast(Any, self), **changed) if changed else self

    def scored_text(self, model: Model, score: Score) -> str:
        """Say how much of a text a score is of; empty where the score says it."""
        return ""

    @abstractmethod
    def __call__(self, model: Model, progress: Progress = ...) -> Score:
        """Measure one model."""
        ...


@runtime_checkable
class Comparison(Evaluator, Protocol):
    """An evaluator whose figures are comparable only when all models are measured in one run."""

    def compare(self, models: Mapping[str, Model], progress: Progress = ...) -> dict[str, Score]:
        """Measure models side by side; the first is what the others are compared with."""
        ...


@runtime_checkable
class Paired(Evaluator, Protocol):
    """An evaluator whose scores can be compared on what two models were both measured on."""

    def versus(self, score: dict[str, Any], base: dict[str, Any]) -> dict[str, float] | None:
        """Return how a score compares with the base's, with its interval; None where that cannot be said."""
        ...


@runtime_checkable
class Baselined(Evaluator, Protocol):
    """An evaluator with figures that need no model, and without which a model's say little."""

    baseline_labels: ClassVar[tuple[str, ...]]

    def baselines(self, base: Model, progress: Progress = ...) -> dict[str, Score]:
        """Measure each of `baseline_labels` on what the base is measured on."""
        ...


@runtime_checkable
class HeldOut(Evaluator, Protocol):
    """An evaluator that reads text, which nothing that makes a variant may have read."""

    def held_out(self, base: Model) -> Corpus:
        """Return that text."""
        ...


def check_protocol(protocol: str) -> None:
    """Raise InputError for a protocol that does not exist."""
    if protocol not in PROTOCOLS:
        raise InputError(f"unknown protocol {one_of(protocol, PROTOCOLS)}")
