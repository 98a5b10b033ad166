"""Studies: variants of one base times evaluators, measured alike, resumable, with one seed or several."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from layerfold import defaults
from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import Model
from layerfold.environment import environment
from layerfold.errors import TrainingError
from layerfold.evaluators import Baselined, Comparison, Evaluator, HeldOut, Paired, Score
from layerfold.files import check_run_folder, hash_json, write_text
from layerfold.methods.base import Notes
from layerfold.progress import SILENT, Progress, Step
from layerfold.records import BASE_LABEL, RECOVERY, Record, RecordStore, Results
from layerfold.study.recipe import Recipe
from layerfold.study.replicates import combined
from layerfold.study.variants import Variants
from layerfold.study.waiting import Waiting
from layerfold.text.corpora import check_disjoint

_MARKER = "study.json"


class Study:
    """Variants of one base times evaluators.

    Each finished record is a file in ``records/``, named by a hash of all that determines it, so that running again
    does only what is missing, and a changed recipe measures only what the change touches. With several seeds, what
    depends on none is measured once.

    Args:
        recipe: what to compare.
        output_dir: the run's folder; made if missing, continued if it holds a study.
        base: the model, if it is loaded already.
        overwrite: write into a folder that holds something else; nothing in it is removed.
        waiting_bytes: memory for variants that are built and wait until all are timed side by side; None takes half of
            what is free. Where more wait, they wait in temporary files and are timed in groups, each with the base.

    Raises:
        OutputError: the folder holds something that is not a study.
        InputError: a method that the base's depth does not admit.
    """

    def __init__(
        self,
        recipe: Recipe,
        output_dir: Path | str,
        *,
        base: Model | None = None,
        overwrite: bool = False,
        waiting_bytes: int | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        check_run_folder(self.output_dir, _MARKER, overwrite=overwrite)
        self.base = base if base is not None else load(recipe.base, revision=recipe.revision)
        self.recipe = recipe.for_base(self.base)
        store = RecordStore(self.output_dir / "records")
        self.passes = {
            seed: Pass(self.recipe.with_seed(seed), self.base, self.output_dir, store, waiting_bytes)
            for seed in self.recipe.seeds or [self.recipe.seed]
        }

    @property
    def labels(self) -> tuple[str, ...]:
        """The variants, the base first."""
        return next(iter(self.passes.values())).labels

    def run(self, progress: Progress = SILENT) -> Iterator[Record]:
        """Measure what is missing, yielding each record as soon as it is stored.

        With recovery, perplexity is measured before and after, everything else after.

        Raises:
            CorpusError: text that a variant is made with stands in text that is scored.
        """
        with progress.doing("reading text"):
            next(iter(self.passes.values())).check_disjoint()  # which documents are read depends on no seed
        marker = {"base": self.base.provenance.to_json(self.output_dir), "recipe": self.recipe.to_json()}
        write_text(self.output_dir / _MARKER, json.dumps(marker, indent=1))
        for seed, one in self.passes.items():
            yield from one.run(progress, "study" if len(self.passes) == 1 else f"study, seed {seed}")

    def results(self) -> Results:
        """Collect the records there are; with several seeds, the means of what depends on the seed."""
        return combined(self.recipe.to_json(), {seed: one.results() for seed, one in self.passes.items()})


_MEASURING, _COMPARING, _RECOVERING = 3.0, 1.0, 15.0
"""How long building and measuring a variant takes against its part in a comparison, and against training on as many
tokens as are scored, for the estimate."""

Measurement = tuple[Evaluator | None, bool]
"""An evaluator, or None for the recovery itself, and whether it comes after recovery."""


class Pass:
    """Variants of one base times evaluators, with one seed.

    Args:
        recipe: what to compare, its seed filled in everywhere.
        base: the model.
        folder: the run's.
        store: where records are kept.
        limit: bytes of memory for variants that wait to be compared, see `Waiting`.

    Raises:
        InputError: a method that the base's depth does not admit.
    """

    def __init__(self, recipe: Recipe, base: Model, folder: Path, store: RecordStore, limit: int | None = None) -> None:
        self.base, self._store, self._limit = base, store, limit
        self.variants = Variants(recipe, base, folder)
        self.recipe = self.variants.recipe

    @property
    def labels(self) -> tuple[str, ...]:
        """The rows, the base first."""
        return self.variants.labels

    def run(self, progress: Progress, description: str) -> Iterator[Record]:
        """Measure what is missing, yielding each record as soon as it is stored."""
        with progress.doing("reading text and records"):
            missing = {
                label: [each for each in self._measurements() if self._stored(label, *each) is None]
                for label in self.labels
            }
        if any(missing.values()):
            for line in self.variants.shortages():
                progress.note(line)
        waiting = Waiting(self.base, self._limit)
        steps = [
            Step(label, self._weight(measurements), partial(self._measure, label, measurements, waiting, progress))
            for label, measurements in missing.items()
            if measurements
        ]
        recovers = self.recipe.recovery is not None
        comparisons = [
            (evaluator, labels)
            for evaluator in self.recipe.evaluate
            if isinstance(evaluator, Comparison)
            and (labels := [label for label in self.labels if (evaluator, recovers) in missing[label]])
        ]
        for evaluator, labels in comparisons:
            compare = partial(self._compare, labels, evaluator, waiting, evaluator is comparisons[-1][0], progress)
            steps.append(Step(evaluator.name, _COMPARING * len(labels), compare))
        for evaluator in self.recipe.evaluate:
            if isinstance(evaluator, Baselined) and None in self._baselines(evaluator):
                steps.append(
                    Step(f"{evaluator.name}, baselines", 1.0, partial(self._measure_baselines, evaluator, progress))
                )
        for step in progress.track(steps, description, sum(step.weight for step in steps)):
            yield from step.payload()

    def _measurements(self) -> list[Measurement]:
        """What is measured of each variant, in order."""
        if self.recipe.recovery is None:
            return [(evaluator, False) for evaluator in self.recipe.evaluate]
        before = [(each, False) for each in self.recipe.evaluate if each.before_recovery]
        return [*before, (None, True), *((each, True) for each in self.recipe.evaluate)]

    def _weight(self, measurements: list[Measurement]) -> float:
        recovery = self.recipe.recovery if (None, True) in measurements else None
        tasks = sum(evaluator.cost for evaluator, _ in measurements if evaluator is not None)
        return _MEASURING + tasks + (0 if recovery is None else _RECOVERING * recovery.tokens / defaults.LIMIT_TOKENS)

    def _measure(
        self,
        label: str,
        measurements: list[Measurement],
        waiting: Waiting,
        progress: Progress,
    ) -> Iterator[Record]:
        """Build a variant, measure it, recover it and measure it again; keep it if it is still to be compared."""
        model, notes = self.variants.build(label, progress)
        recovered = compared = False
        for evaluator, after in measurements:
            started = time.perf_counter()
            if after and not recovered:
                model, recovered = self.variants.recover(label, model, progress), True
            if isinstance(evaluator, Comparison):
                compared = True
                continue
            try:
                score = recovery_score(model) if evaluator is None else evaluator(model, progress)
            except TrainingError as error:
                raise TrainingError(f"variant {label!r}: {error}") from error
            yield self._keep(label, evaluator, after, score, notes, time.perf_counter() - started)
        if compared:
            waiting.add(label, model, notes)

    def _baselines(self, evaluator: Baselined) -> list[Record | None]:
        """The stored records of an evaluator's baselines, None for what is missing."""
        keys = {label: hash_json(self._baseline_subject(label, evaluator)) for label in evaluator.baseline_labels}
        return [self._store.get(evaluator.name, key, label) for label, key in keys.items()]

    def _baseline_subject(self, label: str, evaluator: Baselined) -> dict[str, Any]:
        settings = evaluator.settings(self.base)
        return {
            "baseline": label,
            "evaluator": evaluator.name,
            "protocol": evaluator.protocol_id,
            "settings": settings,
            "seed": getattr(evaluator, "seed", None),
        }

    def _measure_baselines(self, evaluator: Baselined, progress: Progress) -> Iterator[Record]:
        started = time.perf_counter()
        scores = evaluator.baselines(self.base, progress)
        seconds = (time.perf_counter() - started) / len(scores)
        for label, score in scores.items():
            subject = self._baseline_subject(label, evaluator)
            yield self._put(label, evaluator.name, evaluator.protocol_id, subject, score, {}, seconds)

    def _compare(
        self, labels: list[str], evaluator: Comparison, waiting: Waiting, last: bool, progress: Progress
    ) -> Iterator[Record]:
        """Measure variants side by side, in groups that fit in memory, with the base in each.

        Args:
            last: whether no other comparison follows, and what is measured can go.
        """
        recovers = self.recipe.recovery is not None
        left = list(labels)
        for group in waiting.groups(labels):
            started = time.perf_counter()
            scores = evaluator.compare(waiting.together(group), progress)
            seconds = (time.perf_counter() - started) / len(scores)
            # The base's record, where it is missing, is that of the first group.
            for label in [each for each in left if each in (*group, BASE_LABEL)]:
                left.remove(label)
                yield self._keep(label, evaluator, recovers, scores[label], waiting.notes(label), seconds)
            if last:
                waiting.drop(group)

    def results(self) -> Results:
        """Collect the records there are."""
        records: dict[tuple[str, str], Record] = {}
        for label in self.labels:
            for evaluator, after in self._measurements():
                record = self._stored(label, evaluator, after)
                if record is not None and after == (self.recipe.recovery is not None):
                    records[label, record.evaluator] = record
        for label in self.labels:
            self._compare_with_base(label, records)
        baselines = [
            (evaluator, record)
            for evaluator in self.recipe.evaluate
            if isinstance(evaluator, Baselined)
            for record in self._baselines(evaluator)
            if record is not None
        ]
        records |= {(record.label, evaluator.name): record for evaluator, record in baselines}
        names = [evaluator.name for evaluator in self.recipe.evaluate]
        return Results(
            base=self.base.name,
            recipe=self.recipe.to_json(),
            labels=(*self.labels, *(record.label for _, record in baselines)),
            evaluators=(*names, *([RECOVERY] if self.recipe.recovery is not None else [])),
            records=records,
        )

    def _compare_with_base(self, label: str, records: dict[tuple[str, str], Record]) -> None:
        """Put beside a variant's figures how they compare with the base's, and beside its recovery what was before."""
        recovered = records.get((label, RECOVERY))
        for evaluator in self.recipe.evaluate:
            own, base = (records.get((each, evaluator.name)) for each in (label, BASE_LABEL))
            if label != BASE_LABEL and own is not None and base is not None and isinstance(evaluator, Paired):
                own.score["versus_base"] = evaluator.versus(own.score, base.score)
            before = self._stored(label, evaluator, False) if evaluator.before_recovery else None
            if recovered is not None and before is not None:
                recovered.score["before"] = {bound: before.score[bound] for bound in ("value", "low", "high")}

    def check_disjoint(self) -> None:
        """Raise CorpusError where text that a variant is made with stands in text that is scored."""
        held_out = [each.held_out(self.base) for each in self.recipe.evaluate if isinstance(each, HeldOut)]
        for text in self.variants.texts() if held_out else ():
            for scored in held_out:
                check_disjoint(text, scored)

    def _subject(self, label: str, evaluator: Evaluator | None, after: bool) -> dict[str, Any]:
        """All that determines a record."""
        subject = self.variants.subject(label, after)
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
        name = RECOVERY if evaluator is None else evaluator.name
        subject = self._subject(label, evaluator, after)
        return self._put(label, name, self._protocol(evaluator), subject, score, notes, seconds)

    def _put(
        self, label: str, name: str, protocol: str, subject: dict[str, Any], score: Score, notes: Notes, seconds: float
    ) -> Record:
        record = Record(
            key=hash_json(subject),
            label=label,
            evaluator=name,
            protocol=protocol,
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
