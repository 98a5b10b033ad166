"""The interface of all evaluators, and what several of them do alike."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol, Self, TypeVar, cast, get_args, runtime_checkable

from layerfold.checkpoint.model import Model
from layerfold.errors import InputError, check_one_of
from layerfold.maths.intervals import Interval
from layerfold.progress import Progress
from layerfold.settings import settings_of
from layerfold.text.corpora import Corpus

Protocols = Literal["sound", "published"]
PROTOCOLS: tuple[Protocols, ...] = get_args(Protocols)
T = TypeVar("T")


@dataclass(frozen=True)
class Score:
    """A figure with its uncertainty, and the details of its measurement.

    Attributes:
        value: the figure, in `unit`.
        low, high: its interval; equal to the value where it is exact.
        details: further JSON from the evaluator.
    """

    value: float
    low: float
    high: float
    unit: str
    lower_is_better: bool
    details: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, interval: Interval, unit: str, details: Mapping[str, Any], *, lower_is_better: bool) -> Score:
        """Return the score of an estimate with its interval."""
        return cls(interval.value, interval.low, interval.high, unit, lower_is_better, details)

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

    An evaluator needs a `name` and a call. Everything else that a study asks has a default here, or is one of the
    protocols below.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Version of the protocol; a new one makes studies measure again."""
    cost: ClassVar[float] = 0.0
    """Relative duration, for the estimate: building a variant and measuring the usual evaluators takes 3."""
    before_recovery: ClassVar[bool] = False
    """Whether a study with a recovery measures variants before it too, not only after it."""

    @property
    def protocol_id(self) -> str:
        """Name and version of the protocol."""
        return f"{self.name}-{self.version}"

    def settings(self, model: Model) -> dict[str, Any]:
        """Return all that determines the figure besides the model, with defaults resolved, as JSON."""
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

    def _once(self, key: Hashable, read: Callable[[], T]) -> T:
        """Return what `read` returned the first time that it was called under this key."""
        kept: dict[Hashable, T] = self.__dict__.setdefault("_kept", {})
        if key not in kept:
            kept[key] = read()
        return kept[key]


class Published(Evaluator, Protocol):
    """An evaluator with two protocols: its own, and the one of the published study, with a version of its own."""

    protocol: Protocols
    task: ClassVar[str]
    """Name of the protocol, without its version."""
    version: ClassVar[int] = 2
    published_version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_protocol(self.protocol)

    @property
    def published(self) -> bool:
        """Whether this repeats the published measurement."""
        return self.protocol == "published"

    @property
    def protocol_id(self) -> str:
        """Name and version of the protocol."""
        return f"{self.task}-published-{self.published_version}" if self.published else f"{self.task}-{self.version}"


@runtime_checkable
class SideBySide(Evaluator, Protocol):
    """An evaluator whose figures are comparable only between models measured in one run."""

    def compare(self, models: Mapping[str, Model], progress: Progress = ...) -> dict[str, Score]:
        """Measure models in turn; the first is the base of the comparison."""
        ...


@runtime_checkable
class Paired(Evaluator, Protocol):
    """An evaluator that compares two scores on the units that both models were measured on."""

    def versus(self, score: dict[str, Any], base: dict[str, Any]) -> dict[str, float] | None:
        """Compare a score with the base's; return the estimate with its interval, None where they share no units."""
        ...


@runtime_checkable
class Baselined(Evaluator, Protocol):
    """An evaluator whose figures need baselines that no model makes."""

    baseline_labels: ClassVar[tuple[str, ...]]

    def baselines(self, base: Model, progress: Progress = ...) -> dict[str, Score]:
        """Measure each of `baseline_labels` on the text that the base is measured on."""
        ...


@runtime_checkable
class HeldOut(Evaluator, Protocol):
    """An evaluator that scores text, which no variant may have been made with."""

    def held_out(self, base: Model) -> Corpus:
        """Return that text."""
        ...


def check_protocol(protocol: str) -> None:
    """Raise InputError for a protocol that does not exist."""
    check_one_of("unknown protocol", protocol, PROTOCOLS)


def end_of_text(model: Model) -> int:
    """Return the token of a model that pads batches.

    Raises:
        InputError: its tokenizer has no end-of-text token.
    """
    token: int | None = model.require_tokenizer().eos_token_id
    if token is None:
        raise InputError("the tokenizer has no end-of-text token to pad with")
    return token


def encode(model: Model, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text, without special tokens."""
    ids: list[list[int]] = model.require_tokenizer()(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def batches_by_length(rows: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Return the indices of rows in batches of similar length, which need the least padding."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    return [order[first : first + size] for first in range(0, len(order), size)]
