"""What makes a study's rows: each variant built from the base, and trained where the recipe says so."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch

from layerfold.calibration import Calibration, calibration_windows, shortage
from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import Model
from layerfold.checkpoint.weights import dtype_name
from layerfold.errors import CorpusError, InputError, ModelError, TrainingError
from layerfold.evaluators import Perplexity
from layerfold.files import hash_json
from layerfold.methods import Method, Share, Steps
from layerfold.methods.base import Notes
from layerfold.methods.steps import in_order
from layerfold.pipeline import apply
from layerfold.planning.trials import Texts, Trials
from layerfold.progress import SILENT, Progress
from layerfold.records import BASE_LABEL
from layerfold.recovery import Recovery
from layerfold.recovery.text import TrainingText, settings, training_text
from layerfold.repair.repair import Repair
from layerfold.search.auto import searches, selection_text
from layerfold.search.selection import RACE
from layerfold.settings import settings_of
from layerfold.study.recipe import Recipe
from layerfold.study.rows import Load, Planned, Student
from layerfold.text.corpora import Corpus, load_corpus, read_corpus
from layerfold.text.windows import Windows

_LEARNT = ("tokens", "best_step", "validation_perplexity", "seconds")
"""What a student's notes say of how it was distilled."""


class Variants:
    """The variants of a recipe: what determines each, and how it is made.

    Recovered models are kept in ``models/``, so that no training is repeated; runs in progress in ``training/``.

    Raises:
        InputError: a method that the base does not admit.
    """

    def __init__(self, recipe: Recipe, base: Model, folder: Path) -> None:
        # What fits the base is what every row reads, a loaded model's too.
        self.recipe = recipe.for_base(base)
        self.base, self._folder = base, folder
        self._sources: dict[str, Method | Steps | Planned | Load | Student | None] = {BASE_LABEL: None}
        self._repairs = {variant.label: variant.repair for variant in self.recipe.variants if variant.repair != "none"}
        self._resolved: dict[str, dict[str, Any]] = {}
        self._loaded: dict[str, tuple[str, str]] = {}
        self._texts: dict[tuple[int, str], tuple[object, TrainingText]] = {}
        for variant in self.recipe.variants:
            source = variant.method
            self._sources[variant.label] = source
            try:
                if isinstance(source, Student):
                    self._resolved[variant.label] = source.drop(base.decoder).resolved(base.decoder)
                elif not isinstance(source, Load):
                    self._resolved[variant.label] = source.resolved(base.decoder)
            except InputError as error:
                raise InputError(f"variant {variant.label!r}: {error}") from error

    @property
    def labels(self) -> tuple[str, ...]:
        """The rows, the base first."""
        return tuple(self._sources)

    def subject(self, label: str, recovered: bool) -> dict[str, Any]:
        """Return all that determines a variant, before or after recovery."""
        source = self._sources[label]
        calibrated = self._calibrated(label)
        resolved = self._resolved.get(label)
        if isinstance(source, Load):
            if label not in self._loaded:
                self.build(label)
            sha256, dtype = self._loaded[label]
            resolved = settings_of(source) | {"name": Load.name, "sha256": sha256, "dtype": dtype}
        subject: dict[str, Any] = {
            "base_sha256": self.base.sha256,
            "method": resolved,
            "calibration": self._calibration_windows.sha256 if calibrated else None,
            "seed": self.recipe.seed if calibrated else None,
        }
        if source is not None and not isinstance(source, Load | Student | Planned):
            subject["versions"] = {method.name: method.version for method in in_order(source)}
        if isinstance(source, Student):
            distillation = self._distillation(source)
            try:
                subject["distilled"] = settings(distillation, self._text(self.base, distillation), self.base)
            except (InputError, CorpusError) as error:
                raise type(error)(f"variant {label!r}: {error}") from error
        elif searches(source) or isinstance(source, Planned):
            subject["selection"] = self._selection.windows(self.base).sha256
            if not isinstance(source, Share):  # whose windows are all scored on all of the text
                subject["race"] = RACE
        if isinstance(source, Planned):
            subject["repairs"] = [windows.sha256 for windows in (self._repair_windows, self._quick_windows)]
        if (repair := self._repair(label)) is not None:
            subject["repair"] = {**repair.resolved(), "calibration": repair.windows.sha256, "seed": self.recipe.seed}
        return subject | {"recovery": self._recovery_settings} if recovered else subject

    def build(self, label: str, progress: Progress = SILENT) -> tuple[Model, Notes]:
        """Make a variant, as it is before recovery."""
        try:
            return self._built(label, progress)
        except (InputError, CorpusError) as error:
            said = str(error)
            raise type(error)(said if said.startswith("variant ") else f"variant {label!r}: {said}") from error

    def _built(self, label: str, progress: Progress) -> tuple[Model, Notes]:
        source = self._sources[label]
        if source is None:
            return self.base, {}
        if isinstance(source, Load):
            model = load(source.model, revision=source.revision)
            self._loaded[label] = model.sha256, dtype_name(model.saved_dtype)
            return model, {}
        if isinstance(source, Student):
            model = apply(self.base.copy(), source.drop(self.base.decoder), None, self.recipe.seed, self._selection)[0]
            model = self._trained(label, model, self._distillation(source), recovered=False, progress=progress)
            learnt = model.provenance.steps[-1]["notes"]
            return model, {"distilled": {name: learnt[name] for name in _LEARNT}}
        calibration = self._calibration if source.needs_calibration else None
        if calibration is not None:
            calibration.progress = progress
        if isinstance(source, Planned):
            assert calibration is not None
            texts = Texts(calibration, self._quick_windows, self._repair_windows, self._selection, self.recipe.seed)
            key = hash_json(self.subject(label, recovered=False))[:24]
            trials = Trials(self.base, texts, self._folder / "plans" / key, progress)
            found, model = source.plan().find(trials, progress)
            return model, {"planned": {"label": label, **found.configuration.row}, "tried": len(trials.done)}
        repair = self._repair(label)
        return apply(self.base.copy(), source, calibration, self.recipe.seed, self._selection, progress, repair)

    def recover(self, label: str, model: Model, progress: Progress) -> Model:
        """Train a variant, or read what an earlier run of this study made of it.

        Its last step's notes say how training went.
        """
        assert self.recipe.recovery is not None
        return self._trained(label, model, self.recipe.recovery, recovered=True, progress=progress)

    def _trained(self, label: str, model: Model, recovery: Recovery, *, recovered: bool, progress: Progress) -> Model:
        """Train a model on its way to being a variant, or read what came of that."""
        key = hash_json(self.subject(label, recovered))[:24]
        kept = self._folder / "models" / key
        with contextlib.suppress(ModelError):  # damaged: it is trained again, and replaced
            if kept.is_dir() and (found := load(kept)).tokenizer is not None:
                return replace(found, stored=model.stored)
        # Imported when needed: transformers' Trainer takes seconds, and most studies train nothing.
        from layerfold.recovery.run import Run
        from layerfold.recovery.workspace import clear

        try:
            run = Run(
                model,
                recovery,
                self._folder / "training" / key,
                teacher=self.base,
                text=self._text(model, recovery),
                overwrite=True,  # the folder is the study's own
            )
            trained, _ = run(progress)
        except (InputError, ModelError, CorpusError, TrainingError) as error:
            raise type(error)(f"variant {label!r}: {error}") from error
        # In float32 whatever the base came in: what is measured now and in a later run must be one model.
        trained.save(kept, format="compact", overwrite=True, dtype=torch.float32)
        clear(run.folder)
        return trained

    def texts(self) -> list[Corpus]:
        """Return all text that making the variants reads: for calibration, training and selection."""
        found = []
        if self._repairs or any(self._calibrated(label) for label in self.labels):
            corpus = read_corpus(cast(str, self.recipe.calibration.corpus))
            found.append(corpus.split("calibration"))
            if any(windows.split != "calibration" for windows in self._windows_read()):
                found.append(corpus.split("train"))
        if any(searches(source) or isinstance(source, Planned) for source in self._sources.values()):
            found.append(self._selection.read(self.base))
        for name in dict.fromkeys(each.corpus for each in self._recoveries()):
            found += [load_corpus(cast(str, name), split) for split in ("train", "validation")]
        return found

    def shortages(self) -> Iterator[str]:
        """Say which calibration text holds fewer tokens than the recipe asks for."""
        asked = self.recipe.calibration
        if any(self._calibrated(label) for label in self.labels):
            yield from filter(None, [shortage(self._calibration_windows, asked.tokens, "calibration")])
        if self._repairs:
            yield from filter(None, [shortage(self._repair_windows, asked.repair_tokens, "repair")])

    def _windows_read(self) -> Iterator[Windows]:
        """The calibration windows that methods and repairs read."""
        if any(self._calibrated(label) for label in self.labels):
            yield self._calibration_windows
        if self._repairs or any(isinstance(source, Planned) for source in self._sources.values()):
            yield from (self._repair_windows, self._quick_windows)

    def _recoveries(self) -> Iterator[Recovery]:
        if self.recipe.recovery is not None:
            yield self.recipe.recovery
        for source in self._sources.values():
            if isinstance(source, Student):
                yield self._distillation(source)

    def _distillation(self, student: Student) -> Recovery:
        return student.distillation(self.recipe.calibration.corpus)

    @cached_property
    def _recovery_settings(self) -> dict[str, Any]:
        assert self.recipe.recovery is not None
        return settings(self.recipe.recovery, self._text(self.base, self.recipe.recovery), self.base)

    def _calibrated(self, label: str) -> bool:
        source = self._sources[label]
        return source is not None and not isinstance(source, Load | Student) and source.needs_calibration

    def _text(self, model: Model, recovery: Recovery) -> TrainingText:
        """Cut a training text once for each tokenizer; all variants but the loaded ones have the base's."""
        tokenizer = model.require_tokenizer()
        key = id(tokenizer), hash_json(recovery.resolved())
        if key not in self._texts:
            # The tokenizer is kept too: were it to go, another could take its id.
            self._texts[key] = tokenizer, training_text(model, recovery, self.recipe.seed)
        return self._texts[key][1]

    def _repair(self, label: str) -> Repair | None:
        return Repair(self._repairs[label], self._repair_windows) if label in self._repairs else None

    @cached_property
    def _repair_windows(self) -> Windows:
        text = self.recipe.calibration
        return calibration_windows(self.base, text.corpus, text.repair_tokens, self.recipe.seed)

    @cached_property
    def _quick_windows(self) -> Windows:
        text = self.recipe.calibration
        return calibration_windows(self.base, text.corpus, max(2, text.repair_tokens // 4), self.recipe.seed)

    @cached_property
    def _calibration(self) -> Calibration:
        return Calibration(self.base.decoder, self._calibration_windows)

    @cached_property
    def _selection(self) -> Perplexity:
        return selection_text(self.base, self.recipe.calibration.corpus)

    @cached_property
    def _calibration_windows(self) -> Windows:
        text = self.recipe.calibration
        return calibration_windows(self.base, text.corpus, text.tokens, self.recipe.seed)
