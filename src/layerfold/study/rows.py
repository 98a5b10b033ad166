"""Rows of a study: a label, what makes the row, and the repair that follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from layerfold.errors import InputError
from layerfold.methods import METHODS, Drop, Method, Steps
from layerfold.model.decoder import Decoder
from layerfold.planning import Plan
from layerfold.planning.trials import PROTOCOL
from layerfold.recovery import Distill
from layerfold.repair.repair import check_level
from layerfold.settings import build, settings_of


@dataclass(frozen=True)
class Load:
    """A variant that somebody else made: any checkpoint.

    Attributes:
        model: see `hub.load`.
        revision: of a model on the Hub.
    """

    model: str
    revision: str | None = None
    name: ClassVar[str] = "load"


@dataclass(frozen=True)
class Student:
    """A shallower model that begins with every second block of the base, say, and learns from the base.

    As DistilGPT-2 was made (Sanh et al., arXiv 1910.01108, section 3), from far less text. A study's recovery comes
    on top, as for every row.

    Attributes:
        every: blocks 0, every, 2 * every ... are kept.
        tokens: of training text, which is of the corpus that the recipe's calibration text is of.
        learning_rate: the highest; None chooses it as recoveries do.
        published: bases of which there is such a student already, and the checkpoint that is loaded in its place.
    """

    every: int = 2
    tokens: int = 98_304
    learning_rate: float | None = None
    published: Mapping[str, str] = field(default_factory=dict)
    name: ClassVar[str] = "student"

    def __post_init__(self) -> None:
        if self.every < 2:
            raise InputError(f"student every {self.every}; accepted: 2 or more")
        self.distillation(None)

    def drop(self, decoder: Decoder) -> Drop:
        """Return what makes the student out of the base, before it learns.

        Raises:
            InputError: the base has one block.
        """
        if decoder.n_blocks == 1:
            raise InputError("a student of a model of 1 block; accepted: 2 blocks or more")
        return Drop(every=self.every)

    def distillation(self, corpus: str | None) -> Distill:
        """Return how it learns."""
        return Distill(tokens=self.tokens, learning_rate=self.learning_rate, corpus=corpus)

    def source(self, base: str) -> Load | Student:
        """Return the published checkpoint, where there is one of this base, or this."""
        return Load(self.published[base]) if base in self.published else self


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What `Plan` finds within a budget, on the study's own texts: blocks dropped, neurons and heads removed, a repair.

    Attributes:
        parameters: how many distinct ones at most, as ``82M`` or ``66%``;
        perplexity: or how much higher at most, as ``+10%``.
    """

    parameters: str | int | None = None
    perplexity: str | None = None
    name: ClassVar[str] = Plan.name
    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if (self.parameters is None) == (self.perplexity is None):
            raise InputError(f"parameters {self.parameters!r} and perplexity {self.perplexity!r}; accepted: one of two")
        self.plan()

    def plan(self) -> Plan:
        """Return the plan, which tries no more than it needs: what else there is are rows of their own."""
        return Plan(parameters=self.parameters, perplexity=self.perplexity, points=0, rivals=False)

    def resolved(self, decoder: Decoder) -> dict[str, Any]:
        """Return the budget as JSON.

        Raises:
            InputError: the base does not admit it.
        """
        return {"name": self.name, "protocol": PROTOCOL, **asdict(self.plan().budget(decoder))}


_BESIDE = ("label", "repair")
_SOURCES: dict[str, type[Any]] = {each.name: each for each in (Load, Student, Planned)}


class Strict(BaseModel):
    """Part of a recipe: what it does not know is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)


class Variant(Strict):
    """One row of a study: a label, the method that makes it, and the repair that follows."""

    label: str = Field(min_length=1, max_length=60, pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")
    method: Any
    repair: Any = "none"

    def model_post_init(self, context: Any) -> None:
        """Check that the method admits the repair."""
        check_level(self.repair, self.method)

    def to_json(self) -> dict[str, Any]:
        """Return the variant as recipes write it."""
        repair = {} if self.repair == "none" else {"repair": self.repair}
        source = self.method
        made = source.to_json() if isinstance(source, Method) else {source.name: settings_of(source)}
        return {"label": self.label, **made, **repair}


def read_row(value: Any) -> Any:
    """Turn {label: L, merge: {...}} into {label: L, method: Merge(...)}; ``load`` takes a name as well."""
    if not isinstance(value, dict):
        return value
    names = [key for key in value if key not in _BESIDE]
    if len(names) != 1:
        raise InputError(
            f"keys {', '.join(map(str, value)) or 'none'}; accepted: label, repair and one of "
            f"{', '.join(sorted([*METHODS, *_SOURCES, Steps.name]))}"
        )
    name, config = names[0], value[names[0]]
    if name == Steps.name:
        return {key: value[key] for key in _BESIDE if key in value} | {"method": _steps(config)}
    if name == Load.name and isinstance(config, str):
        config = {"model": config}
    return {key: value[key] for key in _BESIDE if key in value} | {
        "method": build("key or method", {**METHODS, **_SOURCES}, name, config)
    }


def _steps(config: Any) -> Steps:
    """Turn [{drop: {...}}, {prune: {...}}] into steps."""
    if not isinstance(config, list) or not all(isinstance(each, dict) and len(each) == 1 for each in config):
        raise InputError("steps; accepted: a list of methods, each with its settings, as - drop: {blocks: 3}")
    return Steps(tuple(build("method", METHODS, *next(iter(each.items()))) for each in config))
