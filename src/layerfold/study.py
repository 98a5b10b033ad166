"""Studies: variants of one base times evaluators, measured alike, resumable."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from layerfold import defaults
from layerfold.corpora import check_disjoint
from layerfold.evaluators import Comparison, Evaluator, Perplexity, Score
from layerfold.evaluators.perplexity import versus
from layerfold.folders import check_run_folder
from layerfold.hub import Model, load
from layerfold.methods.base import Notes
from layerfold.progress import SILENT, Progress, Step
from layerfold.recipe import Recipe
from layerfold.records import BASE_LABEL, RECOVERY, Record, RecordStore, Results, environment, hash_json, write_text
from layerfold.variants import Variants

_MARKER = "study.json"
_MEASURING, _COMPARING, _RECOVERING = 3.0, 1.0, 15.0
"""How long building and measuring a variant takes against its part in a comparison, and against training on as many
tokens as are scored, for the estimate."""

Measurement = tuple[Evaluator | None, bool]
"""An evaluator, or None for the recovery itself, and whether it comes after recovery."""


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
        self.output_dir = Path(output_dir)
        check_run_folder(self.output_dir, _MARKER, overwrite=overwrite)
        self.base = base if base is not None else load(recipe.base, revision=recipe.revision)
        self._store = RecordStore(self.output_dir / "records")
        self._variants = Variants(recipe, self.base, self.output_dir)
        self.recipe = self._variants.recipe

    @property
    def _marker(self) -> Path:
        return self.output_dir / _MARKER

    @property
    def labels(self) -> tuple[str, ...]:
        """The rows, the base first."""
        return self._variants.labels

    def run(self, progress: Progress = SILENT) -> Iterator[Record]:
        """Measure what is missing, yielding each record as soon as it is stored.

        With recovery, perplexity is measured before and after, everything else after.
        """
        with progress.doing("reading text and records"):
            self._check_disjoint()
            missing = {
                label: [each for each in self._measurements() if self._stored(label, *each) is None]
                for label in self.labels
            }
        marker = {"base": self.base.provenance.to_json(), "recipe": self.recipe.to_json()}
        write_text(self._marker, json.dumps(marker, indent=1))
        built: dict[str, tuple[Model, Notes]] = {}
        steps = [
            Step(label, self._weight(measurements), partial(self._measure, label, measurements, built, progress))
            for label, measurements in missing.items()
            if measurements
        ]
        recovers = self.recipe.recovery is not None
        for evaluator in self.recipe.evaluate:
            labels = [label for label in self.labels if (evaluator, recovers) in missing[label]]
            if isinstance(evaluator, Comparison) and labels:
                compare = partial(self._compare, labels, evaluator, built, progress)
                steps.append(Step(evaluator.name, _COMPARING * len(labels), compare))
        for step in progress.track(steps, "study", sum(step.weight for step in steps)):
            yield from step.payload()

    def _measurements(self) -> list[Measurement]:
        """What is measured of each variant, in order."""
        if self.recipe.recovery is None:
            return [(evaluator, False) for evaluator in self.recipe.evaluate]
        before = [(each, False) for each in self.recipe.evaluate if isinstance(each, Perplexity)]
        return [*before, (None, True), *((each, True) for each in self.recipe.evaluate)]

    def _weight(self, measurements: list[Measurement]) -> float:
        recovery = self.recipe.recovery if (None, True) in measurements else None
        return _MEASURING + (0 if recovery is None else _RECOVERING * recovery.tokens / defaults.LIMIT_TOKENS)

    def _measure(
        self,
        label: str,
        measurements: list[Measurement],
        built: dict[str, tuple[Model, Notes]],
        progress: Progress,
    ) -> Iterator[Record]:
        """Build a variant, measure it, recover it and measure it again; keep it if it is still to be compared."""
        model, notes = self._variants.build(label, progress)
        recovered = False
        for evaluator, after in measurements:
            started = time.perf_counter()
            if after and not recovered:
                model, recovered = self._variants.recover(label, model, progress), True
            if isinstance(evaluator, Comparison):
                built[label] = model, notes
                continue
            score = recovery_score(model) if evaluator is None else evaluator(model, progress)
            yield self._keep(label, evaluator, after, score, notes, time.perf_counter() - started)

    def _compare(
        self, labels: list[str], evaluator: Comparison, built: dict[str, tuple[Model, Notes]], progress: Progress
    ) -> Iterator[Record]:
        """Measure variants side by side, with the base among them whether or not it has its record already."""
        models = {BASE_LABEL: self.base} | {label: built[label][0] for label in labels}
        started = time.perf_counter()
        scores = evaluator.compare(models, progress)
        seconds = (time.perf_counter() - started) / len(scores)
        for label in labels:
            recovers = self.recipe.recovery is not None
            yield self._keep(label, evaluator, recovers, scores[label], built[label][1], seconds)

    def results(self) -> Results:
        """Collect the records there are."""
        records: dict[tuple[str, str], Record] = {}
        for label in self.labels:
            for evaluator, after in self._measurements():
                record = self._stored(label, evaluator, after)
                if record is not None and after == (self.recipe.recovery is not None):
                    records[label, record.evaluator] = record
        for label in self.labels:
            self._compare_perplexity(label, records)
        names = [evaluator.name for evaluator in self.recipe.evaluate]
        return Results(
            base=self.base.name,
            recipe=self.recipe.to_json(),
            labels=self.labels,
            evaluators=(*names, *([RECOVERY] if self.recipe.recovery is not None else [])),
            records=records,
        )

    def _compare_perplexity(self, label: str, records: dict[tuple[str, str], Record]) -> None:
        """Put beside a variant's perplexity its quotient with the base's, and beside its recovery what was before."""
        own, base = (records.get((each, Perplexity.name)) for each in (label, BASE_LABEL))
        if label != BASE_LABEL and own is not None and base is not None:
            own.score["versus_base"] = versus(own.score, base.score)
        recovered = records.get((label, RECOVERY))
        for evaluator in self.recipe.evaluate:
            before = self._stored(label, evaluator, False) if isinstance(evaluator, Perplexity) else None
            if recovered is not None and before is not None:
                recovered.score["before"] = {bound: before.score[bound] for bound in ("value", "low", "high")}

    def _check_disjoint(self) -> None:
        """Raise CorpusError where text that a variant is made with stands in the text that is scored."""
        for evaluator in self.recipe.evaluate:
            if isinstance(evaluator, Perplexity):
                for text in self._variants.texts():
                    check_disjoint(text, evaluator.read(self.base))

    def _subject(self, label: str, evaluator: Evaluator | None, after: bool) -> dict[str, Any]:
        """All that determines a record."""
        subject = self._variants.subject(label, after)
        if evaluator is None:
            return {**subject, "evaluator": RECOVERY, "protocol": self._protocol(None), "settings": subject["recovery"]}
        settings = evaluator.settings(self.base)
        return {**subject, "evaluator": evaluator.name, "protocol": evaluator.protocol_id, "settings": settings}

    def _protocol(self, evaluator: Evaluator | None) -> str:
        if evaluator is not None:
            return evaluator.protocol_id
        assert self.recipe.recovery is not None
        return f"{self.recipe.recovery.name}-{self.recipe.recovery.version}"

    def _stored(self, label: str, evaluator: Evaluator | None, after: bool) -> Record | None:
        name = RECOVERY if evaluator is None else evaluator.name
        return self._store.get(name, hash_json(self._subject(label, evaluator, after)), label)

    def _keep(
        self, label: str, evaluator: Evaluator | None, after: bool, score: Score, notes: Notes, seconds: float
    ) -> Record:
        subject = self._subject(label, evaluator, after)
        record = Record(
            key=hash_json(subject),
            label=label,
            evaluator=RECOVERY if evaluator is None else evaluator.name,
            protocol=self._protocol(evaluator),
            score=score.to_json(),
            subject=subject,
            notes=notes,
            environment=environment(),
            seconds=seconds,
        )
        self._store.put(record)
        return record


def recovery_score(model: Model) -> Score:
    """Say how the last step of a model, its recovery, went."""
    done = model.provenance.steps[-1]["notes"]
    value = done["validation_perplexity"]
    return Score(value, value, value, "validation perplexity", lower_is_better=True, details=done)
