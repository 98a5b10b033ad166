"""Rows of a study, one class for each kind: what determines a row, which texts it reads, and how it is made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

from layerfold.checkpoint.load import load_beside
from layerfold.checkpoint.model import Model
from layerfold.checkpoint.weights import dtype_name
from layerfold.errors import InputError
from layerfold.files import hash_json
from layerfold.methods import Drop, Method
from layerfold.methods.base import Notes
from layerfold.model.decoder import Decoder
from layerfold.pipeline import apply
from layerfold.planning import Plan
from layerfold.planning.trials import PROTOCOL, Texts, Trials
from layerfold.progress import Progress
from layerfold.recovery import Distill, Recovery
from layerfold.repair.repair import Repair
from layerfold.search.auto import selected_by
from layerfold.search.selection import RACE
from layerfold.settings import settings_of
from layerfold.study.materials import Materials
from layerfold.text.corpora import Corpus
from layerfold.text.windows import TokenWindows

_LEARNT = ("tokens", "best_step", "validation_perplexity", "seconds")
"""What the notes of a row that is trained say of its training."""


class Row(ABC):
    """A kind of row; a frozen dataclass whose fields are its settings in a recipe, under its name."""

    name: ClassVar[str] = ""

    @abstractmethod
    def build(self, label: str, materials: Materials, progress: Progress) -> tuple[Model, Notes]:
        """Make the model, as it is before recovery.

        Args:
            label: the row's, for the notes.
        """

    def resolved(self, decoder: Decoder) -> dict[str, Any] | None:
        """Return the settings as JSON, spelled out for a base.

        Raises:
            InputError: the base does not admit them.
        """
        return None

    def made_by(self, materials: Materials) -> dict[str, Any] | None:
        """Return what makes the model, as JSON."""
        return self.resolved(materials.base.decoder)

    @property
    def calibrated(self) -> bool:
        """Whether activations on calibration text are read."""
        return False

    @property
    def selects(self) -> bool:
        """Whether candidates are scored on the selection text."""
        return False

    @property
    def repaired(self) -> bool:
        """Whether a repair follows, which reads calibration text."""
        return False

    @property
    def trained_tokens(self) -> int:
        """Tokens of training text that it learns from before a study's own recovery."""
        return 0

    def subject(self, materials: Materials) -> dict[str, Any]:
        """Return all that determines the model, as JSON; records are named by its hash."""
        return {
            "base_sha256": materials.base.sha256,
            **materials.base.decoder.computed,
            "method": self.made_by(materials),
            "calibration": materials.calibration_windows.sha256 if self.calibrated else None,
            "seed": materials.seed if self.calibrated else None,
        }

    def texts(self, materials: Materials) -> Iterator[Corpus]:
        """Yield all text that is read to make the model."""
        for windows in self._windows(materials):
            yield from materials.read(materials.corpus, dict.fromkeys(["calibration", *windows.split.split("+")]))
        if self.selects:
            yield materials.selection.read(materials.base)

    def _windows(self, materials: Materials) -> Iterator[TokenWindows]:
        """Yield the calibration windows that are read."""
        if self.calibrated:
            yield materials.calibration_windows
        if self.repaired:
            yield materials.repair_windows

    def for_base(self, base: str) -> Row:
        """Return the row that takes this one's place for a base."""
        return self

    def to_json(self) -> dict[str, Any]:
        """Return the row as recipes write it, without label and repair."""
        return {self.name: settings_of(self)}


@dataclass(frozen=True)
class Base(Row):
    """The model that all others are compared with."""

    def build(self, label: str, materials: Materials, progress: Progress) -> tuple[Model, Notes]:
        """Return the base."""
        return materials.base, {}


@dataclass(frozen=True)
class Built(Row):
    """What a method makes of the base, or several, with the repair that follows."""

    by: Method
    repair: Any = "none"

    def resolved(self, decoder: Decoder) -> dict[str, Any]:
        """Return the resolved method."""
        return self.by.resolved(decoder)

    @property
    def calibrated(self) -> bool:
        """Whether the method reads activations."""
        return self.by.needs_calibration

    @property
    def selects(self) -> bool:
        """Whether the method leaves something to a search."""
        return bool(self.by.searched)

    @property
    def repaired(self) -> bool:
        """Whether there is a repair."""
        return bool(self.repair != "none")

    def subject(self, materials: Materials) -> dict[str, Any]:
        """Return all that determines the model: versions, the selection text and the repair too."""
        subject = super().subject(materials) | selected_by(self.by, materials.base, materials.selection)
        subject["versions"] = {method.name: method.version for method in self.by.steps}
        if (repair := self._repair(materials)) is not None:
            subject["repair"] = {**repair.resolved(), "calibration": repair.windows.sha256, "seed": materials.seed}
        return subject

    def build(self, label: str, materials: Materials, progress: Progress) -> tuple[Model, Notes]:
        """Apply the method to a copy of the base, and repair it."""
        base, repair = materials.base.copy(), self._repair(materials)
        calibration = materials.calibration(progress) if self.calibrated else None
        method, searched = materials.settled(self.by, calibration, progress)
        return apply(base, method, calibration, materials.seed, materials.selection, progress, repair, searched)

    def _repair(self, materials: Materials) -> Repair | None:
        return Repair(self.repair, materials.repair_windows) if self.repaired else None

    def to_json(self) -> dict[str, Any]:
        """Return the method as recipes write it."""
        return self.by.to_json()


@dataclass(frozen=True)
class Trained(Row):
    """Another row, trained by a recovery of its own before it is measured; a study's recovery comes on top.

    Attributes:
        row: what makes the model.
        recovery: how it is trained. Its text is of the corpus that the calibration text is of, unless it names one.
    """

    row: Row
    recovery: Recovery

    def resolved(self, decoder: Decoder) -> dict[str, Any] | None:
        """Return what makes the model before it is trained."""
        return self.row.resolved(decoder)

    def made_by(self, materials: Materials) -> dict[str, Any] | None:
        """Return what makes the model before it is trained."""
        return self.row.made_by(materials)

    @property
    def calibrated(self) -> bool:
        """Whether activations on calibration text are read."""
        return self.row.calibrated

    @property
    def selects(self) -> bool:
        """Whether candidates are scored on the selection text."""
        return self.row.selects

    @property
    def repaired(self) -> bool:
        """Whether a repair comes before training."""
        return self.row.repaired

    @property
    def trained_tokens(self) -> int:
        """Tokens of training text, those of the row itself included."""
        tokens: int = self.recovery.tokens
        return tokens + self.row.trained_tokens

    def subject(self, materials: Materials) -> dict[str, Any]:
        """Return all that determines the model: how it is trained too."""
        return {"trained": materials.training(self._recovery(materials)), "row": self.row.subject(materials)}

    def build(self, label: str, materials: Materials, progress: Progress) -> tuple[Model, Notes]:
        """Make the model and train it, or read what came of that before."""
        recovery = self._recovery(materials)
        model, notes = self.row.build(label, materials, progress)
        model = materials.trained(self.subject(materials), model, recovery, progress)
        learnt = model.provenance.steps[-1]["notes"]
        return model, {**notes, "recovered": {name: learnt[name] for name in _LEARNT}}

    def texts(self, materials: Materials) -> Iterator[Corpus]:
        """Yield what the model is made with, what it learns from, and what chooses its weights."""
        yield from self.row.texts(materials)
        yield from materials.read(self._recovery(materials).corpus or "", ("train", "validation"))

    def for_base(self, base: str) -> Row:
        """Return the row that takes this one's place for a base, trained alike."""
        return replace(self, row=self.row.for_base(base))

    def to_json(self) -> dict[str, Any]:
        """Return the row as recipes write it."""
        return {**self.row.to_json(), "recovery": {self.recovery.name: settings_of(self.recovery)}}

    def _recovery(self, materials: Materials) -> Recovery:
        return replace(self.recovery, corpus=self.recovery.corpus or materials.corpus)


@dataclass(frozen=True)
class Load(Row):
    """A variant that somebody else made: any checkpoint.

    Attributes:
        model: see `load`.
        revision: of a model on the Hub.
    """

    model: str
    revision: str | None = None
    name: ClassVar[str] = "load"

    def made_by(self, materials: Materials) -> dict[str, Any]:
        """Return the settings with the hash of the weights, which are loaded if they have not been."""
        if (self.model, self.revision) not in materials.loaded:
            self._load(materials)
        sha256, dtype = materials.loaded[self.model, self.revision]
        return settings_of(self) | {"name": self.name, "sha256": sha256, "dtype": dtype}

    def build(self, label: str, materials: Materials, progress: Progress) -> tuple[Model, Notes]:
        """Load the model."""
        return self._load(materials), {}

    def _load(self, materials: Materials) -> Model:
        model = load_beside(materials.base, self.model, revision=self.revision)
        materials.loaded[self.model, self.revision] = model.sha256, dtype_name(model.saved_dtype)
        return model


@dataclass(frozen=True)
class Student(Row):
    """A shallower model that starts from every second block of the base, say, and learns from the base.

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

    def resolved(self, decoder: Decoder) -> dict[str, Any]:
        """Return what is dropped."""
        return self.drop(decoder).resolved(decoder)

    @property
    def trained_tokens(self) -> int:
        """Tokens that it learns from."""
        return self.tokens

    def for_base(self, base: str) -> Row:
        """Return the published checkpoint, where there is one of this base, or this."""
        return Load(self.published[base]) if base in self.published else self

    def drop(self, decoder: Decoder) -> Drop:
        """Return the method that makes the student from the base, before it learns.

        Raises:
            InputError: the base has one block.
        """
        if decoder.n_blocks == 1:
            raise InputError("a student of a model of 1 block; accepted: 2 blocks or more")
        return Drop(every=self.every)

    def distillation(self, corpus: str | None) -> Distill:
        """Return how it learns."""
        return Distill(tokens=self.tokens, learning_rate=self.learning_rate, corpus=corpus)

    def subject(self, materials: Materials) -> dict[str, Any]:
        """Return all that determines the model: how it learns too."""
        distillation = self.distillation(materials.corpus)
        return super().subject(materials) | {"distilled": materials.training(distillation)}

    def build(self, label: str, materials: Materials, progress: Progress) -> tuple[Model, Notes]:
        """Drop blocks from a copy of the base and train it, or read what came of that before."""
        drop, distillation = self.drop(materials.base.decoder), self.distillation(materials.corpus)
        begun, _ = apply(materials.base.copy(), drop, None, materials.seed, materials.selection)
        model = materials.trained(self.subject(materials), begun, distillation, progress)
        learnt = model.provenance.steps[-1]["notes"]
        return model, {"distilled": {name: learnt[name] for name in _LEARNT}}

    def texts(self, materials: Materials) -> Iterator[Corpus]:
        """Yield what it learns from, and is judged by."""
        yield from materials.read(materials.corpus, ("train", "validation"))


@dataclass(frozen=True, kw_only=True)
class Budgeted(Row):
    """What `Plan` finds within a budget, on the study's own texts: blocks dropped, neurons and heads removed, a repair.

    Attributes:
        parameters: how many distinct ones at most, as ``82M`` or ``66%``;
        perplexity: or how much higher at most, as ``+10%``.
    """

    parameters: str | int | None = None
    perplexity: str | None = None
    name: ClassVar[str] = Plan.name
    calibrated: ClassVar[bool] = True
    selects: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if (self.parameters is None) == (self.perplexity is None):
            raise InputError(f"parameters {self.parameters!r} and perplexity {self.perplexity!r}; accepted: one of two")
        self.plan()

    def plan(self) -> Plan:
        """Return the plan, without rival methods: those are rows of their own."""
        return Plan(parameters=self.parameters, perplexity=self.perplexity, points=0, rivals=False)

    def resolved(self, decoder: Decoder) -> dict[str, Any]:
        """Return the budget."""
        return {"name": self.name, "protocol": PROTOCOL, **asdict(self.plan().budget(decoder))}

    def subject(self, materials: Materials) -> dict[str, Any]:
        """Return all that determines the model: the texts of selection and repair too."""
        return super().subject(materials) | {
            "selection": materials.selection.windows(materials.base).sha256,
            "race": RACE,
            "repairs": [windows.sha256 for windows in (materials.repair_windows, materials.quick_windows)],
        }

    def build(self, label: str, materials: Materials, progress: Progress) -> tuple[Model, Notes]:
        """Try candidates, and make the best."""
        repairs = materials.quick_windows, materials.repair_windows
        texts = Texts(materials.calibration(progress), *repairs, materials.selection, materials.seed)
        folder = materials.folder / "plans" / hash_json(self.subject(materials))[:24]
        trials = Trials(materials.base, texts, folder, progress)
        found, model = self.plan().find(trials, progress)
        return model, {"planned": {"label": label, **found.configuration.row}, "tried": len(trials.done)}

    def _windows(self, materials: Materials) -> Iterator[TokenWindows]:
        yield from (materials.calibration_windows, materials.repair_windows, materials.quick_windows)
