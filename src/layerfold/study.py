"""Studies: variants of one base times evaluators, measured alike, resumable."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from layerfold.calibration import Calibration
from layerfold.corpora import check_disjoint, load_corpus
from layerfold.errors import InputError, OutputError
from layerfold.evaluators import Comparison, Evaluator, Perplexity, Score
from layerfold.evaluators.perplexity import versus
from layerfold.hub import Model, default_corpus, load
from layerfold.methods import Method
from layerfold.methods.base import Notes
from layerfold.progress import SILENT, Progress, Step
from layerfold.recipe import Recipe
from layerfold.records import BASE_LABEL, Record, RecordStore, Results, environment, hash_json, write_text
from layerfold.windows import Windows, cut_windows

_MARKER = "study.json"
_CALIBRATION_CONTEXT = 1024
_MEASURING, _COMPARING = 3.0, 1.0
"""How long building and measuring a variant takes against its part in a comparison, for the estimate."""


class Study:
    """Variants of one base times evaluators.

    Each finished record is a file in ``records/``, named by a hash of all that determines it, so that running again
    does only what is missing, and a changed recipe measures only what the change touches.

    Args:
        recipe: what to compare.
        output_dir: the run's folder; made if missing, continued if it holds a study.
        base: the model, if it is loaded already.
        overwrite: write into a folder that holds something else; nothing in it is removed.

    Raises:
        OutputError: the folder holds something that is not a study.
        InputError: a method that the base's depth does not admit.
    """

    def __init__(
        self, recipe: Recipe, output_dir: Path | str, *, base: Model | None = None, overwrite: bool = False
    ) -> None:
        self.recipe = recipe
        self.output_dir = Path(output_dir)
        if self.output_dir.exists() and not self.output_dir.is_dir():
            raise OutputError(
                f"the output {str(output_dir)!r} is a file; accepted: a folder that is empty, new or a study's"
            )
        # What a killed process left of the marker itself is no reason to refuse.
        held = [] if not self.output_dir.is_dir() else [p for p in self.output_dir.iterdir() if p.suffix != ".tmp"]
        if held and not overwrite and not self._marker.is_file():
            raise OutputError(
                f"the output folder {str(output_dir)!r} holds something other than a study; --overwrite writes into it"
            )
        self.base = base if base is not None else load(recipe.base, revision=recipe.revision)
        self._store = RecordStore(self.output_dir / "records")
        self._methods: dict[str, Method | None] = {BASE_LABEL: None}
        for variant in recipe.variants:
            try:
                variant.method.resolved(self.base.decoder.n_blocks)
            except InputError as error:
                raise InputError(f"variant {variant.label!r}: {error}") from error
            self._methods[variant.label] = variant.method

    @property
    def _marker(self) -> Path:
        return self.output_dir / _MARKER

    @property
    def labels(self) -> tuple[str, ...]:
        """The rows, the base first."""
        return tuple(self._methods)

    def run(self, progress: Progress = SILENT) -> Iterator[Record]:
        """Measure what is missing, yielding each record as soon as it is stored."""
        with progress.doing("reading text and records"):
            self._check_disjoint()
            missing = {
                label: [evaluator for evaluator in self.recipe.evaluate if self._stored(label, evaluator) is None]
                for label in self.labels
            }
        marker = {"base": self.base.provenance.to_json(), "recipe": self.recipe.to_json()}
        write_text(self._marker, json.dumps(marker, indent=1))
        built: dict[str, tuple[Model, Notes]] = {}
        steps = [
            Step(label, _MEASURING, partial(self._measure, label, evaluators, built, progress))
            for label, evaluators in missing.items()
            if evaluators
        ]
        for evaluator in self.recipe.evaluate:
            labels = [label for label in self.labels if evaluator in missing[label]]
            if isinstance(evaluator, Comparison) and labels:
                compare = partial(self._compare, labels, evaluator, built, progress)
                steps.append(Step(evaluator.name, _COMPARING * len(labels), compare))
        for step in progress.track(steps, "study", sum(step.weight for step in steps)):
            yield from step.payload()

    def _measure(
        self, label: str, evaluators: list[Evaluator], built: dict[str, tuple[Model, Notes]], progress: Progress
    ) -> Iterator[Record]:
        """Build a variant and measure it; keep it if it is still to be compared."""
        model, notes = self._build(label, progress)
        for evaluator in evaluators:
            if isinstance(evaluator, Comparison):
                built[label] = model, notes
            else:
                started = time.perf_counter()
                score = evaluator(model, progress)
                yield self._keep(label, evaluator, score, notes, time.perf_counter() - started)

    def _compare(
        self, labels: list[str], evaluator: Comparison, built: dict[str, tuple[Model, Notes]], progress: Progress
    ) -> Iterator[Record]:
        """Measure variants side by side, with the base among them whether or not it has its record already."""
        models = {BASE_LABEL: self.base} | {label: built[label][0] for label in labels}
        started = time.perf_counter()
        scores = evaluator.compare(models, progress)
        seconds = (time.perf_counter() - started) / len(scores)
        for label in labels:
            yield self._keep(label, evaluator, scores[label], built[label][1], seconds)

    def results(self) -> Results:
        """Collect the records there are."""
        records: dict[tuple[str, str], Record] = {}
        for label in self.labels:
            for evaluator in self.recipe.evaluate:
                record = self._stored(label, evaluator)
                if record is not None:
                    records[label, evaluator.name] = record
        base = records.get((BASE_LABEL, Perplexity.name))
        for label in self.labels[1:]:
            record = records.get((label, Perplexity.name))
            if record is not None and base is not None:
                record.score["versus_base"] = versus(record.score, base.score)
        return Results(
            base=self.base.name,
            recipe=self.recipe.to_json(),
            labels=self.labels,
            evaluators=tuple(evaluator.name for evaluator in self.recipe.evaluate),
            records=records,
        )

    def _build(self, label: str, progress: Progress) -> tuple[Model, Notes]:
        method = self._methods[label]
        if method is None:
            return self.base, {}
        calibration = self._calibration if method.needs_calibration else None
        if calibration is not None:
            calibration.progress = progress
        return apply(self.base.copy(), method, calibration, self.recipe.seed)

    @cached_property
    def _calibration(self) -> Calibration:
        return Calibration(self.base.decoder, self._calibration_windows)

    @cached_property
    def _calibration_windows(self) -> Windows:
        text = self.recipe.calibration
        return calibration_windows(self.base, text.corpus, text.tokens, self.recipe.seed)

    def _check_disjoint(self) -> None:
        """Raise CorpusError where calibration text stands in the text that is scored."""
        if not any(method is not None and method.needs_calibration for method in self._methods.values()):
            return
        for evaluator in self.recipe.evaluate:
            if isinstance(evaluator, Perplexity):
                name = self.recipe.calibration.corpus or default_corpus(self.base)
                check_disjoint(load_corpus(name, "calibration"), evaluator.read(self.base))

    def _subject(self, label: str, evaluator: Evaluator) -> dict[str, Any]:
        """All that determines a record."""
        method = self._methods[label]
        calibrated = method is not None and method.needs_calibration
        return {
            "base_sha256": self.base.sha256,
            "method": None if method is None else method.resolved(self.base.decoder.n_blocks),
            "calibration": self._calibration_windows.sha256 if calibrated else None,
            "seed": self.recipe.seed if calibrated else None,
            "evaluator": evaluator.name,
            "protocol": evaluator.protocol_id,
            "settings": evaluator.settings(self.base),
        }

    def _stored(self, label: str, evaluator: Evaluator) -> Record | None:
        return self._store.get(evaluator.name, hash_json(self._subject(label, evaluator)), label)

    def _keep(self, label: str, evaluator: Evaluator, score: Score, notes: Notes, seconds: float) -> Record:
        subject = self._subject(label, evaluator)
        record = Record(
            key=hash_json(subject),
            label=label,
            evaluator=evaluator.name,
            protocol=evaluator.protocol_id,
            score=score.to_json(),
            subject=subject,
            notes=notes,
            environment=environment(),
            seconds=seconds,
        )
        self._store.put(record)
        return record


def calibration_windows(model: Model, corpus: str | None, tokens: int, seed: int) -> Windows:
    """Cut calibration text for a model: the ``calibration`` split of a corpus, documents in a seeded order."""
    text = load_corpus(corpus or default_corpus(model), "calibration")
    context = min(model.decoder.context, _CALIBRATION_CONTEXT)
    return cut_windows(text, model.require_tokenizer(), context=context, limit_tokens=tokens, seed=seed)


def apply(model: Model, method: Method, calibration: Calibration | None, seed: int) -> tuple[Model, Notes]:
    """Edit the model's decoder in place; return it with the step added to its provenance, and the method's notes."""
    resolved = method.resolved(model.decoder.n_blocks)
    notes = method.apply(model.decoder, calibration)
    windows = calibration.windows if calibration is not None else None
    step = {
        "method": resolved,
        "seed": seed,
        "calibration": None
        if windows is None
        else {
            "corpus": windows.corpus,
            "split": windows.split,
            "tokens": int(windows.lengths.sum()),
            "context": windows.context,
            "corpus_sha256": windows.corpus_sha256,
            "tokens_sha256": windows.sha256,
        },
        "notes": notes,
    }
    return model.with_step(step), notes
