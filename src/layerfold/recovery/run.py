"""Run a recovery: choose the learning rate, train, resume, and keep the best weights."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState

from layerfold.checkpoint.model import Model
from layerfold.checkpoint.save import quiet, read_training_
from layerfold.errors import InputError, TrainingError
from layerfold.files import output_errors
from layerfold.model.decoder import Decoder
from layerfold.progress import SILENT, Progress
from layerfold.recovery.arguments import check
from layerfold.recovery.base import FIRST_LEARNING_RATE, Recovery
from layerfold.recovery.callbacks import Bar, Bookkeeper
from layerfold.recovery.outcome import Outcome, outcome_of
from layerfold.recovery.processes import is_main, this_process
from layerfold.recovery.rates import Trial, search
from layerfold.recovery.teacher import check_teacher, counterparts
from layerfold.recovery.text import TrainingText, settings, training_text
from layerfold.recovery.trainer import RecoveryTrainer
from layerfold.recovery.workspace import claim

_SEARCH = "search.json"
_SAMPLED = 8
"""Windows whose text the tokenizers of a model and its teacher must cut alike."""


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
        """Train, or go on where a killed process left off; return the recovered model and what was done.

        A model that lacks what the recovery trains stays as it is, after no tokens.

        Raises:
            InputError: the folder holds a run with other settings.
            TrainingError: it diverged; the folder keeps the last checkpoint before that.
            OutputError: the folder cannot be written.
        """
        with output_errors(self.folder), quiet(), _evaluating(self.teacher):
            known = {"model_sha256": self.model.sha256, **settings(self.recovery, self.text, self.teacher)}
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
        # A copy, which the training leaves on its device, its dropout off and, under FSDP, in pieces. A model in half
        # precision is trained with float32 weights: small steps would be rounded away.
        copied = self.model.decoder.copy()
        half = copied.dtype in (torch.bfloat16, torch.float16)
        copied.model.float()
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
        if device.type == "cpu":
            return self.teacher.decoder
        copied = self.teacher.decoder.copy()
        copied.model.to(device)
        return copied

    def _is_its_own_teacher(self) -> bool:
        """Whether there is nothing to learn; what gradients remain are rounding errors, which Adam would magnify."""
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
        outcome = outcome_of(
            self.recovery.name,
            self.text,
            trainer.state,
            seconds=seconds,
            learning_rate=rate,
            tried=tried,
            parameters_trained=trainer.parameters_trained,
        )
        recovered = self.model.copy()
        if outcome.best_step:
            read_training_(recovered.decoder.model, self.folder / f"checkpoint-{outcome.best_step}")
        # From here on one process may remove the folder, as the command does, or a run that overwrites: not before
        # the others have read their weights.
        this_process().wait_for_everyone()
        step = {
            "method": {**settings(self.recovery, self.text, self.teacher), "learning_rate": rate},
            "seed": self.text.seed,
            "calibration": None,
            "notes": outcome.to_json(),
        }
        return recovered.with_step(step), outcome


@contextmanager
def _evaluating(model: Model | None) -> Iterator[None]:
    """Switch a model to evaluation, and back to what it was."""
    if model is None:
        yield
        return
    were = [(module, module.training) for module in model.decoder.model.modules()]
    model.decoder.model.eval()
    try:
        yield
    finally:
        for module, was in were:
            module.training = was
