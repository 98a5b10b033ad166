"""Studies: variants of one base times evaluators, measured alike, resumable, with one seed or several."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from layerfold import defaults
from layerfold.calibration import shortage
from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import Model
from layerfold.environment import VARIABLES, environment
from layerfold.errors import CorpusError, InputError, LayerfoldError, ModelError, TrainingError
from layerfold.evaluators import Baselined, Evaluator, HeldOut, Paired, Score, SideBySide
from layerfold.files import check_run_folder, hash_json, write_text
from layerfold.methods.base import Notes
from layerfold.progress import SILENT, Progress, Step
from layerfold.records import BASE_LABEL, RECOVERY, Record, RecordStore, Results
from layerfold.study.materials import Materials
from layerfold.study.recipe import Recipe
from layerfold.study.replicates import combined
from layerfold.study.rows import Base, Row
from layerfold.study.waiting import Waiting
from layerfold.text.corpora import check_disjoint

_MARKER = "study.json"
T = TypeVar("T")


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
        places = {name: getattr(recipe, name) for name in VARIABLES}
        self.base = base if base is not None else load(recipe.base, revision=recipe.revision, **places)
        self.recipe = recipe.for_base(self.base)
        store = RecordStore(self.output_dir / "records")
        self.replicates = {
            seed: Replicate(self.recipe.with_seed(seed), self.base, self.output_dir, store, waiting_bytes)
            for seed in self.recipe.seeds or [self.recipe.seed]
        }

    @property
    def _first(self) -> Replicate:
        return next(iter(self.replicates.values()))

    @property
    def labels(self) -> tuple[str, ...]:
        """The variants, the base first."""
        return self._first.labels

    def run(self, progress: Progress = SILENT) -> Iterator[Record]:
        """Measure what is missing, yielding each record as soon as it is stored.

        With recovery, perplexity is measured before and after, everything else after.

        Raises:
            CorpusError: text that a variant is made with stands in text that is scored.
        """
        with progress.doing("reading text"):
            self._first.check_disjoint()  # which documents are read depends on no seed
        marker = {"base": self.base.provenance.to_json(self.output_dir), "recipe": self.recipe.to_json()}
        write_text(self.output_dir / _MARKER, json.dumps(marker, indent=1))
        for seed, one in self.replicates.items():
            yield from one.run(progress, "study" if len(self.replicates) == 1 else f"study, seed {seed}")

    def results(self) -> Results:
        """Collect the records there are; with several seeds, the means of what depends on the seed."""
        return combined(self.recipe.to_json(), {seed: one.results() for seed, one in self.replicates.items()})


_MEASURING, _COMPARING, _RECOVERING = 3.0, 1.0, 15.0
"""How long building and measuring a variant takes against its part in a comparison, and against training on as many
tokens as are scored, for the estimate."""

Measurement = tuple[Evaluator | None, bool]
"""An evaluator, or None for the recovery itself, and whether it comes after recovery."""


class Replicate:
    """Rows times evaluators, with one seed.

    Args:
        recipe: what to compare: its seed filled in everywhere, and what fits the base.
        base: the model.
        folder: the run's.
        store: where records are kept.
        limit: bytes of memory for variants that wait to be compared, see `Waiting`.

    Raises:
        InputError: a method that the base does not admit.
    """

    def __init__(self, recipe: Recipe, base: Model, folder: Path, store: RecordStore, limit: int | None = None) -> None:
        self.recipe, self.base, self._store, self._limit = recipe, base, store, limit
        self.rows: dict[str, Row] = {BASE_LABEL: Base()} | {each.label: each.row for each in recipe.variants}
        self.materials = Materials(base, folder, recipe.seed, **recipe.calibration.model_dump())
        self._subjects: dict[str, dict[str, Any]] = {}
        for label, row in self.rows.items():
            with _naming(label, InputError):
                row.resolved(base.decoder)

    @property
    def labels(self) -> tuple[str, ...]:
        """The rows, the base first."""
        return tuple(self.rows)

    def run(self, progress: Progress, description: str) -> Iterator[Record]:
        """Measure what is missing, yielding each record as soon as it is stored."""
        with progress.doing("reading text and records"):
            missing = {label: found for label in self.labels if (found := self._missing(label))}
            comparisons = {
                evaluator.name: (evaluator, labels)
                for evaluator in self.recipe.evaluate
                if isinstance(evaluator, SideBySide)
                and (labels := [label for label, found in missing.items() if (evaluator, self._recovers) in found])
            }
            baselined = [each for each in self._baselined() if None in self._baselines(each)]
        for line in self._shortages() if missing else ():
            progress.note(line)
        steps = [
            *(Step(label, self._weight(label, found)) for label, found in missing.items()),
            *(Step(name, _COMPARING * len(labels)) for name, (_, labels) in comparisons.items()),
            *(Step(f"{each.name}, baselines", 1.0) for each in baselined),
        ]
        bar = iter(progress.track(steps, description, sum(step.weight for step in steps)))
        waiting = Waiting(self.base, self._limit)
        for label, measurements in _along(bar, missing.items()):
            yield from self._measure(label, measurements, waiting, progress)
        for number, (evaluator, labels) in enumerate(_along(bar, comparisons.values()), start=1):
            yield from self._compare(labels, evaluator, waiting, number == len(comparisons), progress)
        for each in _along(bar, baselined):
            yield from self._measure_baselines(each, progress)
        next(bar, None)  # the last step is done too

    def _measure(
        self, label: str, measurements: list[Measurement], waiting: Waiting, progress: Progress
    ) -> Iterator[Record]:
        """Build a row, measure it, recover it and measure it again; keep it if it is still to be compared."""
        model, notes = self.build(label, progress)
        recovered = compared = False
        for evaluator, after in measurements:
            started = time.perf_counter()
            if after and not recovered:
                model, recovered = self.recover(label, model, progress), True
            if isinstance(evaluator, SideBySide):
                compared = True
                continue
            with _naming(label, TrainingError):
                score = recovery_score(model) if evaluator is None else evaluator(model, progress)
            yield self._keep(label, self._subject(label, evaluator, after), score, notes, time.perf_counter() - started)
        if compared:
            waiting.add(label, model, notes)

    def _compare(
        self, labels: list[str], evaluator: SideBySide, waiting: Waiting, last: bool, progress: Progress
    ) -> Iterator[Record]:
        """Measure rows side by side, in groups that fit in memory, with the base in each.

        Args:
            last: whether no other comparison follows, so that measured models can be freed.
        """
        left = list(labels)
        for group in waiting.groups(labels):
            started = time.perf_counter()
            scores = evaluator.compare(waiting.together(group), progress)
            seconds = (time.perf_counter() - started) / len(scores)
            # The base's record, where it is missing, is that of the first group.
            for label in [each for each in left if each in (*group, BASE_LABEL)]:
                left.remove(label)
                subject = self._subject(label, evaluator, self._recovers)
                yield self._keep(label, subject, scores[label], waiting.notes(label), seconds)
            if last:
                waiting.drop(group)

    def _measure_baselines(self, evaluator: Baselined, progress: Progress) -> Iterator[Record]:
        started = time.perf_counter()
        scores = evaluator.baselines(self.base, progress)
        seconds = (time.perf_counter() - started) / len(scores)
        for label, score in scores.items():
            yield self._keep(label, self._baseline_subject(label, evaluator), score, {}, seconds)

    def build(self, label: str, progress: Progress = SILENT) -> tuple[Model, Notes]:
        """Make a row's model, as it is before recovery."""
        with _naming(label, InputError, CorpusError, ModelError, TrainingError):
            return self.rows[label].build(label, self.materials, progress)

    def recover(self, label: str, model: Model, progress: Progress) -> Model:
        """Train a row's model, or read what an earlier run of this study made of it."""
        assert self.recipe.recovery is not None
        with _naming(label, InputError, CorpusError, ModelError, TrainingError):
            return self.materials.trained(self.subject(label, True), model, self.recipe.recovery, progress)

    def results(self) -> Results:
        """Collect the records there are."""
        records: dict[tuple[str, str], Record] = {}
        for label in self.labels:
            for evaluator, after in self._measurements:
                record = self._stored(label, evaluator, after)
                if record is not None and after == self._recovers:
                    records[label, record.evaluator] = record
        for label in self.labels:
            self._compare_with_base(label, records)
        baselines = [record for each in self._baselined() for record in self._baselines(each) if record is not None]
        records |= {(record.label, record.evaluator): record for record in baselines}
        return Results(
            base=self.base.name,
            recipe=self.recipe.to_json(),
            labels=(*self.labels, *(record.label for record in baselines)),
            evaluators=(*(each.name for each in self.recipe.evaluate), *([RECOVERY] if self._recovers else [])),
            records=records,
        )

    def _compare_with_base(self, label: str, records: dict[tuple[str, str], Record]) -> None:
        """Add to a row's scores how they compare with the base's, and to its recovery the figure before it."""
        recovered = records.get((label, RECOVERY))
        for evaluator in self.recipe.evaluate:
            own, base = (records.get((each, evaluator.name)) for each in (label, BASE_LABEL))
            if label != BASE_LABEL and own is not None and base is not None and isinstance(evaluator, Paired):
                own.score["versus_base"] = evaluator.versus(own.score, base.score)
            before = self._stored(label, evaluator, False) if evaluator.before_recovery else None
            if recovered is not None and before is not None:
                recovered.score["before"] = {bound: before.score[bound] for bound in ("value", "low", "high")}

    def check_disjoint(self) -> None:
        """Raise CorpusError where text that a row is made with stands in text that is scored."""
        held_out = [each.held_out(self.base) for each in self.recipe.evaluate if isinstance(each, HeldOut)]
        if not held_out:
            return
        texts = [text for row in self.rows.values() for text in row.texts(self.materials)]
        if (recovery := self.recipe.recovery) is not None:
            texts += self.materials.read(recovery.corpus or "", ("train", "validation"))
        for text in {(text.name, text.split): text for text in texts}.values():
            for scored in held_out:
                check_disjoint(text, scored)

    def _shortages(self) -> Iterator[str]:
        """Say which calibration text holds fewer tokens than the recipe asks for."""
        asked, rows = self.recipe.calibration, self.rows.values()
        if any(row.calibrated for row in rows):
            yield from filter(None, [shortage(self.materials.calibration_windows, asked.tokens, "calibration")])
        if any(row.repaired for row in rows):
            yield from filter(None, [shortage(self.materials.repair_windows, asked.repair_tokens, "repair")])

    @property
    def _recovers(self) -> bool:
        return self.recipe.recovery is not None

    @cached_property
    def _measurements(self) -> list[Measurement]:
        """What is measured of each row, in order."""
        if not self._recovers:
            return [(evaluator, False) for evaluator in self.recipe.evaluate]
        before = [(each, False) for each in self.recipe.evaluate if each.before_recovery]
        return [*before, (None, True), *((each, True) for each in self.recipe.evaluate)]

    def _missing(self, label: str) -> list[Measurement]:
        return [each for each in self._measurements if self._stored(label, *each) is None]

    def _weight(self, label: str, measurements: list[Measurement]) -> float:
        recovery = self.recipe.recovery if (None, True) in measurements else None
        tasks = sum(evaluator.cost for evaluator, _ in measurements if evaluator is not None)
        trained = self.rows[label].trained_tokens + (0 if recovery is None else recovery.tokens)
        return _MEASURING + tasks + _RECOVERING * trained / defaults.LIMIT_TOKENS

    def _baselined(self) -> list[Baselined]:
        return [each for each in self.recipe.evaluate if isinstance(each, Baselined)]

    def _baselines(self, evaluator: Baselined) -> list[Record | None]:
        """Return the stored records of an evaluator's baselines, None for each that is missing."""
        return [self._get(label, self._baseline_subject(label, evaluator)) for label in evaluator.baseline_labels]

    def _baseline_subject(self, label: str, evaluator: Baselined) -> dict[str, Any]:
        return {"baseline": label, **self._measured_by(evaluator), "seed": getattr(evaluator, "seed", None)}

    def _measured_by(self, evaluator: Evaluator) -> dict[str, Any]:
        settings = evaluator.settings(self.base)
        return {"evaluator": evaluator.name, "protocol": evaluator.protocol_id, "settings": settings}

    def subject(self, label: str, recovered: bool) -> dict[str, Any]:
        """Return all that determines a row's model, before or after recovery."""
        if label not in self._subjects:
            with _naming(label, InputError, CorpusError):
                self._subjects[label] = self.rows[label].subject(self.materials)
        return self._subjects[label] | ({"recovery": self._recovery} if recovered else {})

    @cached_property
    def _recovery(self) -> dict[str, Any]:
        assert self.recipe.recovery is not None
        return self.materials.training(self.recipe.recovery)

    def _subject(self, label: str, evaluator: Evaluator | None, after: bool) -> dict[str, Any]:
        """All that determines a record."""
        subject, recovery = self.subject(label, after), self.recipe.recovery
        if evaluator is not None:
            return {**subject, **self._measured_by(evaluator)}
        assert recovery is not None
        protocol = f"{recovery.name}-{recovery.version}"
        return {**subject, "evaluator": RECOVERY, "protocol": protocol, "settings": subject["recovery"]}

    def _stored(self, label: str, evaluator: Evaluator | None, after: bool) -> Record | None:
        return self._get(label, self._subject(label, evaluator, after))

    def _get(self, label: str, subject: dict[str, Any]) -> Record | None:
        return self._store.get(subject["evaluator"], hash_json(subject), label)

    def _keep(self, label: str, subject: dict[str, Any], score: Score, notes: Notes, seconds: float) -> Record:
        record = Record(
            key=hash_json(subject),
            label=label,
            evaluator=subject["evaluator"],
            protocol=subject["protocol"],
            score=score.to_json(),
            subject=subject,
            notes=notes,
            environment=environment() | self.base.decoder.computed,
            seconds=seconds,
        )
        self._store.put(record)
        return record


def recovery_score(model: Model) -> Score:
    """Return the score of a model's last step, its recovery."""
    done = model.provenance.steps[-1]["notes"]
    value = done["validation_perplexity"]
    return Score(value, value, value, "validation perplexity", lower_is_better=True, details=done)


def _along(bar: Iterator[Step], items: Iterable[T]) -> Iterator[T]:
    """Yield items, and advance a bar that several loops share by one step for each."""
    for item in items:
        next(bar)
        yield item


@contextlib.contextmanager
def _naming(label: str, *errors: type[LayerfoldError]) -> Iterator[None]:
    """Name the variant in errors."""
    try:
        yield
    except errors as error:
        said = str(error)
        raise type(error)(said if said.startswith("variant ") else f"variant {label!r}: {said}") from error
