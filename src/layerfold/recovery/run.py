"""Run a recovery: choose the learning rate, train, resume, and keep the best weights."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from safetensors import SafetensorError

from layerfold import checkpoint
from layerfold.errors import InputError, LayerfoldError, OutputError, TrainingError
from layerfold.hub import Model
from layerfold.progress import SILENT, Progress
from layerfold.records import write_text
from layerfold.recovery.base import Recovery
from layerfold.recovery.callbacks import Bar, Bookkeeper
from layerfold.recovery.rates import Trial, search
from layerfold.recovery.teacher import check_teacher, counterparts
from layerfold.recovery.text import TrainingText, settings, training_text
from layerfold.recovery.trainer import RecoveryTrainer

_SETTINGS, _SEARCH = "recovery.json", "search.json"
_TRACKED = "runs"
"""Where TensorBoard's callback writes, below the run's folder."""


@dataclass(frozen=True)
class Outcome:
    """What a recovery did.

    Attributes:
        method: ``finetune`` or ``distill``.
        tokens: how many were trained on, those of the learning rate's search apart.
        search_tokens: how many that search took.
        seconds: of all of it, over all resumptions.
        learning_rate: the highest.
        learning_rates: what was tried, each with the validation perplexity at its end; None where it diverged.
        steps: optimiser steps.
        best_step: the one whose weights were kept; 0 where training never beat what it began with.
        validation_perplexity: of the weights kept.
        curve: ``train`` and ``validation``: lists of [tokens, nats per token].
        parameters_trained: distinct, those that are frozen left out.
    """

    method: str
    tokens: int
    search_tokens: int
    seconds: float
    learning_rate: float
    learning_rates: list[dict[str, float | None]]
    steps: int
    best_step: int
    validation_perplexity: float
    curve: dict[str, list[list[float]]]
    parameters_trained: int

    def to_json(self) -> dict[str, Any]:
        """Return all of it."""
        return asdict(self)


class Run:
    """One recovery of one model, in a folder of its own that it can be continued in.

    Args:
        model: what is to recover; stays as it is.
        recovery: how.
        teacher: where the recovery needs one; stays as it is.
        folder: holds the settings, the learning rates tried and the checkpoints; made if missing.
        text: what to train on, where it has been cut already.
        seed: orders the training text.
        overwrite: begin anew where the folder holds a run with other settings.

    Raises:
        InputError: settings that the model, the text or the teacher do not admit.
        CorpusError: text that is missing or too short.
    """

    def __init__(
        self,
        model: Model,
        recovery: Recovery,
        folder: Path,
        *,
        teacher: Model | None = None,
        text: TrainingText | None = None,
        seed: int = 0,
        overwrite: bool = False,
    ) -> None:
        self.model, self.recovery, self.teacher, self._overwrite = model, recovery, teacher, overwrite
        self.folder = folder.resolve()
        self.text = text if text is not None else training_text(model, recovery, seed)
        self._counterparts: tuple[int, ...] = ()
        if recovery.needs_teacher:
            if teacher is None:
                raise InputError(f"{recovery.name} needs a teacher")
            tokenizer = model.require_tokenizer()
            check_teacher(model, teacher, recovery, str(tokenizer.decode(self.text.train.input_ids[0])))
            if recovery.needs_hidden_states:
                self._counterparts = counterparts(model, teacher, recovery)

    def __call__(self, progress: Progress = SILENT) -> tuple[Model, Outcome]:
        """Train, or go on where a killed process left off; return the recovered model and what was done.

        Raises:
            InputError: the folder holds a run with other settings.
            TrainingError: it diverged; the folder keeps the last checkpoint before that.
            OutputError: the folder cannot be written.
        """
        with _output_errors(self.folder), checkpoint.quiet():
            self._claim()
            tried = self._search(progress) if self.recovery.learning_rate is None else []
            rate = self.recovery.learning_rate or min(tried, key=lambda trial: trial.nats).learning_rate
            book = Bookkeeper(self.folder)
            trainer = self._trainer(self.text, rate, True, book, Bar(progress, "training, steps"))
            book.trainer = trainer
            resumed = book.resume()
            trainer.args.eval_on_start = resumed is None
            try:
                trainer.train(resume_from_checkpoint=resumed)
            except TrainingError as error:
                kept = book.newest()
                where = f"the last good checkpoint is {kept}" if kept else "no checkpoint had been written yet"
                raise TrainingError(f"training diverged at learning rate {rate:g}: {error}; {where}") from None
            return self._finish(trainer, book, rate, tried)

    def _claim(self) -> None:
        """Take the folder for these settings, or find that it is theirs already."""
        path = self.folder / _SETTINGS
        wanted = {"model_sha256": self.model.sha256, **settings(self.recovery, self.text, self.teacher)}
        known = _read_json(path)
        held = self.folder.is_dir() and any(
            each.suffix != ".tmp" and each.name != _TRACKED for each in self.folder.iterdir()
        )
        if held and known is None:
            raise OutputError(f"the folder {str(self.folder)!r} holds something other than a training run")
        if known is not None and known != wanted:
            if not self._overwrite:
                changed = [key for key in {**known, **wanted} if known.get(key) != wanted.get(key)]
                told = ", ".join(f"{key} was {known.get(key)!r:.40} and is {wanted.get(key)!r:.40}" for key in changed)
                raise InputError(f"the run in {str(self.folder)!r} was begun with other settings: {told}")
            clear(self.folder)
            known = None
        if known is None and is_main():
            write_text(path, json.dumps(wanted, indent=1))
        PartialState().wait_for_everyone()

    def _search(self, progress: Progress) -> list[Trial]:
        """Try learning rates, each over the same short run."""
        text = self.text.shortened(self.recovery.search_fraction)

        def run(rate: float) -> Trial:
            started = time.perf_counter()
            trainer = self._trainer(text, rate, False, Bar(progress, f"trying learning rate {rate:g}, steps"))
            try:
                trainer.train()
                nats = trainer.evaluate()["eval_loss"]
            except TrainingError:
                nats = math.inf
            return Trial(rate, nats, text.tokens, time.perf_counter() - started)

        return search(run, self.folder / _SEARCH, is_main())

    def _trainer(self, text: TrainingText, rate: float, checkpoints: bool, *callbacks: Any) -> RecoveryTrainer:
        # A copy, which the training leaves on its device, its dropout off and, under FSDP, in pieces.
        copied = self.model.decoder.copy().model
        return RecoveryTrainer(
            copied,
            self.recovery,
            text,
            learning_rate=rate,
            folder=self.folder,
            checkpoints=checkpoints,
            tokenizer=self.model.tokenizer,
            teacher=self._teacher_model(),
            counterparts=self._counterparts,
            masked=self.model.masked,
            callbacks=list(callbacks),
        )

    def _teacher_model(self) -> Any:
        if self.teacher is None or not self.recovery.needs_teacher:
            return None
        device = PartialState().device
        found = self.teacher.decoder if device.type == "cpu" else self.teacher.decoder.copy()
        return found.model.to(device).eval()

    def _finish(
        self, trainer: RecoveryTrainer, book: Bookkeeper, rate: float, tried: list[Trial]
    ) -> tuple[Model, Outcome]:
        state = trainer.state
        best_step = int(state.best_global_step or 0)
        recovered = self.model.copy()
        if best_step:
            checkpoint.read_dense_(recovered.decoder.model, self.folder / f"checkpoint-{best_step}")
        a_step = self.text.train.context * self.text.batch_size
        history = state.log_history
        outcome = Outcome(
            method=self.recovery.name,
            tokens=state.global_step * a_step,
            search_tokens=sum(trial.tokens for trial in tried),
            seconds=book.seconds + sum(trial.seconds for trial in tried),
            learning_rate=rate,
            learning_rates=[
                {
                    "learning_rate": trial.learning_rate,
                    "validation": None if math.isinf(trial.nats) else math.exp(trial.nats),
                }
                for trial in tried
            ],
            steps=state.global_step,
            best_step=best_step,
            validation_perplexity=math.exp(cast(float, state.best_metric)),
            curve={
                name: [[entry["step"] * a_step, entry[key]] for entry in history if key in entry]
                for name, key in (("train", "lm_loss"), ("validation", "eval_loss"))
            },
            parameters_trained=trainer.parameters_trained,
        )
        step = {
            "method": {**settings(self.recovery, self.text, self.teacher), "learning_rate": rate},
            "seed": self.text.seed,
            "calibration": None,
            "notes": outcome.to_json(),
        }
        return recovered.with_step(step), outcome


def clear(folder: Path) -> None:
    """Remove a run's files, once the recovered model is safe elsewhere; what a tracker wrote there stays."""
    if is_main() and folder.is_dir():
        for path in folder.iterdir():
            if path.name != _TRACKED:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()
    PartialState().wait_for_everyone()


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def is_main() -> bool:
    """Whether this is the process that writes: the only one, or the first of those launched together."""
    return bool(PartialState().is_main_process)


@contextmanager
def _output_errors(folder: Path) -> Iterator[None]:
    """Say in one line that the folder cannot be written, whichever library finds out, in whichever way."""
    try:
        yield
    except LayerfoldError:
        raise
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {str(folder)!r}: {error}") from error
    except RuntimeError as error:
        # What torch raises where the disk is full.
        if "PytorchStreamWriter" in str(error) or "iostream" in str(error):
            raise OutputError(f"cannot write {str(folder)!r}: {str(error).splitlines()[0]}") from error
        raise
