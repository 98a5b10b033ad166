"""The run of a recovery: choose the learning rate, train or resume, and keep the best weights."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from transformers import TrainerState

from layerfold.checkpoint.model import Model
from layerfold.checkpoint.save import quiet, read_training_
from layerfold.environment import current, placed
from layerfold.errors import InputError, TrainingError
from layerfold.files import output_errors
from layerfold.model.decoder import Decoder
from layerfold.progress import SILENT, Progress
from layerfold.recovery.arguments import check
from layerfold.recovery.base import FIRST_LEARNING_RATE, Recovery
from layerfold.recovery.callbacks import Bar, Bookkeeper
from layerfold.recovery.processes import is_main, this_process
from layerfold.recovery.rates import Trial, search
from layerfold.recovery.teacher import check_teacher, counterparts
from layerfold.recovery.text import TrainingText, settings, training_text
from layerfold.recovery.trainer import RecoveryTrainer, trainable
from layerfold.recovery.workspace import claim

_SEARCH = "search.json"
_SAMPLED = 8
"""Number of windows whose text the tokenizers of a model and its teacher must cut alike."""


@dataclass(frozen=True)
class Outcome:
    """The result of a recovery, as records and checkpoints keep it.

    Attributes:
        method: name of the recovery.
        tokens: number of training tokens, without the search for a learning rate.
        search_tokens: number of tokens of that search.
        seconds: total duration, resumed runs and the search included.
        learning_rate: highest learning rate; None where there was nothing to learn.
        learning_rates: learning rates tried, each with the validation perplexity at its end; None where it diverged.
        steps: number of optimiser steps.
        best_step: step of the kept weights; 0 where training never improved the model.
        validation_perplexity: validation perplexity of the kept weights.
        curve: ``train`` and ``validation``: lists of [tokens, nats per token].
        parameters_trained: number of distinct parameters that were trained.
    """

    method: str
    tokens: int
    search_tokens: int
    seconds: float
    learning_rate: float | None
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
    """One recovery of one model, in a folder from which it can be resumed.

    Args:
        model: model to recover; not changed.
        recovery: settings.
        folder: folder of the settings, the learning rates tried and the checkpoints; made if missing.
        teacher: teacher, where the recovery needs one; not changed.
        text: training text, where it has been cut already.
        seed: seed of the order of the training text.
        overwrite: start again where the folder holds a run with other settings.

    Raises:
        InputError: settings that do not fit the model, the text or the teacher.
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
        with placed(str(model.decoder.device), None):  # training follows the model
            check(model.decoder, recovery)
        self._counterparts: tuple[int, ...] = ()
        if recovery.needs_teacher:
            if teacher is None:
                raise InputError(f"{recovery.name} needs a teacher")
            tokenizer = model.require_tokenizer()
            sample = str(tokenizer.decode(self.text.train.input_ids[:_SAMPLED].flatten()))
            check_teacher(model, teacher, recovery, self.text.train, sample)
            if recovery.needs_hidden_states:
                self._counterparts = counterparts(model, teacher, recovery)

    def __call__(self, progress: Progress = SILENT) -> tuple[Model, Outcome]:
        """Train, or resume a killed run; return the recovered model and the outcome.

        A model without the tensors that the recovery trains is returned unchanged, after no tokens.

        Raises:
            InputError: the folder holds a run with other settings.
            TrainingError: training diverged; the folder keeps the last checkpoint before that.
            OutputError: the folder cannot be written.
        """
        device = self.model.decoder.device
        with output_errors(self.folder), quiet(), placed(str(device), None), current(device):
            known = {
                "model_sha256": self.model.sha256,
                **self.model.decoder.computed,
                **settings(self.recovery, self.text, self.teacher),
            }
            claim(self.folder, known, self._overwrite)
            if self._is_its_own_teacher() or self.recovery.lacks(self.model.decoder):
                return self._unchanged()
            tried = self._search(progress) if self.recovery.learning_rate is None else []
            rate = self.recovery.learning_rate or min(tried, key=lambda trial: trial.nats).learning_rate
            book = Bookkeeper(self.folder)
            trainer = self._trainer(self.text, rate, True, book, Bar(progress, "training, steps"))
            book.trainer = trainer
            resumed = book.resume()
            trainer.args.eval_on_start = resumed is None
            try:
                if resumed is not None and book.over:
                    trainer.state = TrainerState.load_from_json(str(Path(resumed) / "trainer_state.json"))
                else:
                    trainer.train(resume_from_checkpoint=resumed)
            except TrainingError as error:
                kept = book.newest()
                where = f"the last good checkpoint is {kept}" if kept else "no checkpoint had been written yet"
                raise TrainingError(f"training diverged at learning rate {rate:g}: {error}; {where}") from None
            return self._finish(trainer, book.seconds, rate, tried)

    def _search(self, progress: Progress) -> list[Trial]:
        """Try learning rates, each in the same short run."""
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
        # A copy: training moves it to the device, turns its dropout off and, under FSDP, shards it.
        copied, half = trainable(self.model.decoder)
        return RecoveryTrainer(
            copied,
            self.recovery,
            text,
            learning_rate=rate,
            folder=self.folder,
            checkpoints=checkpoints,
            tokenizer=self.model.tokenizer,
            teacher=self._placed_teacher(),
            counterparts=self._counterparts,
            callbacks=list(callbacks),
            autocast=half,
        )

    def _placed_teacher(self) -> Decoder | None:
        if self.teacher is None or not self.recovery.needs_teacher:
            return None
        device = this_process().device
        # On the processor a copy of the modules alone, not of their parameters: the caller's keep their training mode.
        offloaded = self.teacher.decoder.offloaded
        placed = self.teacher.decoder.copy(share=device.type == "cpu" or offloaded)
        placed.model.eval()
        if not offloaded:
            placed.model.to(device)
        return placed

    def _is_its_own_teacher(self) -> bool:
        """Whether there is nothing to learn: all gradients are rounding errors, which Adam would magnify."""
        itself = self.teacher is not None and self.teacher.sha256 == self.model.sha256
        own_blocks = self._counterparts in ((), tuple(range(self.model.decoder.n_blocks)))
        return self.recovery.only_imitates and itself and own_blocks

    def _unchanged(self) -> tuple[Model, Outcome]:
        started = time.perf_counter()
        trainer = self._trainer(self.text, FIRST_LEARNING_RATE, False)
        trainer.state.best_metric = trainer.evaluate()["eval_loss"]
        return self._finish(trainer, time.perf_counter() - started, None, [])

    def _finish(
        self, trainer: RecoveryTrainer, seconds: float, rate: float | None, tried: list[Trial]
    ) -> tuple[Model, Outcome]:
        """Read the outcome from the trainer's state and the trials, and the best weights from their checkpoint."""
        state, a_step = trainer.state, self.text.train.context * self.text.batch_size
        outcome = Outcome(
            method=self.recovery.name,
            tokens=state.global_step * a_step,
            search_tokens=sum(trial.tokens for trial in tried),
            seconds=seconds + sum(trial.seconds for trial in tried),
            learning_rate=rate,
            learning_rates=[
                {
                    "learning_rate": trial.learning_rate,
                    "validation": None if math.isinf(trial.nats) else math.exp(trial.nats),
                }
                for trial in tried
            ],
            steps=state.global_step,
            best_step=int(state.best_global_step or 0),
            validation_perplexity=math.exp(cast(float, state.best_metric)),
            curve={
                name: [[entry["step"] * a_step, entry[key]] for entry in state.log_history if key in entry]
                for name, key in (("train", "lm_loss"), ("validation", "eval_loss"))
            },
            parameters_trained=trainer.parameters_trained,
        )
        recovered = self.model.copy()
        if outcome.best_step:
            read_training_(recovered.decoder.model, self.folder / f"checkpoint-{outcome.best_step}")
        # The main process may remove the folder after this, so all others must have read their weights.
        this_process().wait_for_everyone()
        step = {
            "method": {**settings(self.recovery, self.text, self.teacher), "learning_rate": rate},
            "seed": self.text.seed,
            "calibration": None,
            "notes": outcome.to_json(),
        }
        return recovered.with_step(step), outcome
