"""The same as the commands, from Python."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from layerfold import defaults
from layerfold.calibration import Calibration, calibration_windows
from layerfold.checkpoint.load import load, load_beside
from layerfold.checkpoint.model import Model, default_corpus, is_pocket
from layerfold.errors import InputError, OfflineError, one_of
from layerfold.evaluators import EVALUATORS, Evaluator, HeldOut, Score
from layerfold.evaluators.base import Protocols, check_protocol
from layerfold.methods import METHODS, Method, Steps
from layerfold.pipeline import apply
from layerfold.progress import SILENT, Progress
from layerfold.recovery import Recovery
from layerfold.repair.repair import Level, Repair, check_level
from layerfold.search.auto import selection_text
from layerfold.text.corpora import check_disjoint, load_corpus, read_corpus
from layerfold.text.sources import ALL, unsplit
from layerfold.text.used import check_unread, texts_read

METRICS = ("size", "perplexity", "latency", "generation")
T = TypeVar("T")


def register(kind: type[T]) -> type[T]:
    """Let recipes and commands name a method or an evaluator that is not of this package; a class decorator.

    Args:
        kind: a frozen dataclass that extends `Method` or `Evaluator`. Its fields are the settings in a recipe.

    Raises:
        InputError: it extends neither, has no `name`, or one that another has.
    """
    registries: dict[type, dict[str, type[Any]]] = {Method: METHODS, Evaluator: EVALUATORS}
    registry = next((registries[base] for base in kind.__mro__ if base in registries), None)
    name = getattr(kind, "name", None)
    if registry is None or not name:
        raise InputError(f"{kind.__name__}; accepted: a class that extends Method or Evaluator, with a name")
    if registry.get(name, kind) is not kind or name == Steps.name:
        raise InputError(f"name {name!r} of {kind.__name__}; accepted: one that is not taken by another class")
    registry[name] = kind
    return kind


def compress(
    model: Model | str | Path,
    method: Method,
    *,
    corpus: str | None = None,
    tokens: int = defaults.CALIBRATION_TOKENS,
    repair: Level = "none",
    repair_tokens: int = defaults.REPAIR_TOKENS,
    seed: int = 0,
    in_place: bool = False,
    progress: Progress = SILENT,
) -> Model:
    """Return a smaller model.

    Args:
        model: a loaded model, or a name for `load`.
        method: for example ``Merge(n=4)``, or ``Steps`` of several.
        corpus: calibration text, of which the ``calibration`` split is read, the ``train`` split too where that is
            short, and the ``validation`` split where a method leaves something to a search; None takes the one that
            fits the model.
        tokens: how many tokens of the first.
        repair: what puts right in closed form what the method breaks: ``rescale``, ``refit`` or ``refit+attention``
            (see `Repair`), or ``none``.
        repair_tokens: how many calibration tokens that reads.
        seed: orders its documents.
        in_place: edit the given model instead of a copy, which needs no second set of weights.

    Raises:
        InputError: a setting that the model does not admit.
        LayerfoldError: what `load` and `load_corpus` raise.
    """
    if not isinstance(model, Model):
        model, in_place = load(model), True
    check_level(repair, method)
    method.resolved(model.decoder)
    model = model if in_place else model.copy()
    calibration = None
    if method.needs_calibration:
        windows = calibration_windows(
            model, corpus, tokens, seed, note=lambda read: progress.note(f"calibration: {read}")
        )
        calibration = Calibration(model.decoder, windows, progress)
    after = None
    if repair != "none":
        windows = calibration_windows(
            model, corpus, repair_tokens, seed, note=lambda read: progress.note(f"repair: {read}")
        )
        after = Repair(repair, windows)
    compressed, _ = apply(model, method, calibration, seed, selection_text(model, corpus), progress, after)
    return compressed


def recover(
    model: Model | str | Path,
    recovery: Recovery,
    *,
    teacher: Model | str | Path | None = None,
    held_out: str | None = None,
    training_dir: Path | str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Model:
    """Return a trained model; the one given stays as it is.

    Args:
        model: a loaded model, or a name for `load`.
        recovery: for example ``Distill(tokens=100_000)``.
        teacher: what `Distill` learns from; None takes the base that the model was made from.
        held_out: a corpus that must share no document with the text that is read: its ``test`` split, or all of
            another file without splits. None takes the one that pocket is measured on, and none for other models.
        training_dir: a folder that a killed run goes on in; the caller's to remove. None takes a temporary one.
        seed: orders the training text.
        overwrite: begin anew where `training_dir` holds a run with other settings.

    Raises:
        InputError: settings that the model, its text or the teacher do not admit.
        CorpusError: text that is missing, too short, or stands in the test text.
        TrainingError: the run diverged.
        LayerfoldError: what `load` raises.
    """
    from layerfold.recovery.run import Run
    from layerfold.recovery.teacher import default_teacher
    from layerfold.recovery.text import training_text
    from layerfold.recovery.workspace import temporary_folder

    model = model if isinstance(model, Model) else load(model)
    if lack := recovery.lacks(model.decoder):
        raise InputError(lack)
    if held_out is None and is_pocket(model):
        held_out = default_corpus(model)
    if held_out is not None:
        read = read_corpus(recovery.corpus or default_corpus(model))
        whole = unsplit(held_out) and Path(held_out).resolve() != Path(read[ALL].name).resolve()
        scored = load_corpus(held_out, ALL if whole else "test")
        for split in ("train", "validation"):
            check_disjoint(read.split(split), scored)
    if not recovery.needs_teacher:
        if teacher is not None:
            raise InputError(f"a teacher, and {recovery.name}, which has none; accepted: a teacher with distill")
    elif teacher is None:
        teacher = default_teacher(model)
    elif not isinstance(teacher, Model):
        teacher = load_beside(model, teacher)
    with temporary_folder() if training_dir is None else contextlib.nullcontext(Path(training_dir)) as folder:
        training = training_text(model, recovery, seed, progress)
        run = Run(model, recovery, folder, teacher=teacher, text=training, seed=seed, overwrite=overwrite)
        recovered, _ = run(progress)
    return recovered


def evaluate(
    model: Model | str | Path,
    metrics: Iterable[str] = METRICS,
    *,
    corpus: str | None = None,
    split: str | None = None,
    limit_tokens: int | None = None,
    protocol: Protocols = "sound",
    progress: Progress = SILENT,
) -> dict[str, Score]:
    """Measure a model.

    Args:
        model: a loaded model, or a name for `load`.
        metrics: names of evaluators.
        corpus, split, limit_tokens: what perplexity is measured on. Without a split it is all of a file, or of a
            folder whose files are not named by split, and the ``test`` split of any other corpus.
        protocol: ``published`` repeats the published measurement where there is one.

    Returns:
        Scores by metric, in the order asked for.

    Raises:
        InputError: settings that the model does not admit.
        CorpusError: text that is missing, too short, or that the model was made with.
        LayerfoldError: what `load` and `load_corpus` raise.
    """
    scores = each_score(
        model, metrics, corpus=corpus, split=split, limit_tokens=limit_tokens, protocol=protocol, progress=progress
    )
    return dict(scores)


def each_score(
    model: Model | str | Path,
    metrics: Iterable[str] = METRICS,
    *,
    corpus: str | None = None,
    split: str | None = None,
    limit_tokens: int | None = None,
    protocol: Protocols = "sound",
    progress: Progress = SILENT,
) -> Iterator[tuple[str, Score]]:
    """Measure as `evaluate` does, and yield each metric and its score as soon as there is one.

    What can be known to be refused is refused before anything is measured.
    """
    names = list(dict.fromkeys(metrics))
    check_protocol(protocol)
    if not names:
        raise InputError(f"no metrics; accepted: {', '.join(EVALUATORS)}")
    for name in names:
        if name not in EVALUATORS:
            raise InputError(f"unknown metric {one_of(name, EVALUATORS)}")
    whole = corpus is not None and (split == ALL or (split is None and unsplit(corpus)))
    text = {"corpus": corpus, "split": ALL if whole else split or "test", "limit_tokens": limit_tokens}
    evaluators: list[Evaluator] = [EVALUATORS[name]().asked(text, protocol) for name in names]
    loaded = model if isinstance(model, Model) else load(model)
    with progress.doing("reading text"):
        if corpus is not None and any(getattr(each, "split", None) == ALL for each in evaluators):
            check_unread(loaded.provenance, read_corpus(corpus))
        for evaluator in evaluators:
            try:
                evaluator.settings(loaded)
                if isinstance(evaluator, HeldOut):
                    evaluator.held_out(loaded)
            except OfflineError as error:
                raise OfflineError(f"{error}{_proposed(loaded)}") from error
    for evaluator in evaluators:
        score = evaluator(loaded, progress)
        if said := evaluator.scored_text(loaded, score):
            score = replace(score, details={**score.details, "text": said})
        yield evaluator.name, score


def _proposed(model: Model) -> str:
    """Name a text that the model was made with, where there is one."""
    names = dict.fromkeys(read.corpus for read in texts_read(model.provenance))
    return f"; the model's layerfold.json names {next(iter(names))!r}" if names else ""
