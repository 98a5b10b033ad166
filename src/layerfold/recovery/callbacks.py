"""Callbacks of training: the progress bar, the clock, and the marks of complete checkpoints."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from layerfold.files import write_text
from layerfold.progress import Progress
from layerfold.recovery.processes import this_process

_WHOLE = "layerfold-training.json"


class Bar(TrainerCallback):
    """Advances a progress bar with every training step."""

    def __init__(self, progress: Progress, description: str) -> None:
        self._progress, self._description = progress, description
        self._bar: Iterator[int] = iter(())

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Draw the bar at the run's current step."""
        if state.is_world_process_zero:
            self._bar = iter(self._progress.track(range(state.max_steps), self._description))
            for _step in range(state.global_step + 1):
                next(self._bar, None)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Advance the bar."""
        next(self._bar, None)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Complete the bar, where training stopped early."""
        for _step in self._bar:
            pass


class Bookkeeper(TrainerCallback):
    """Marks each checkpoint as complete, and keeps the newest and the best.

    The mark holds the time spent so far, the first loss, and whether training is over. The weights before training
    count as the first to be scored: only better ones are kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._before, self._started = 0.0, time.perf_counter()
        self.trainer: Any = None
        """The trainer whose first loss is recorded; set after its construction."""
        self.over = False
        """Whether the checkpoint to resume from is the last."""

    @property
    def seconds(self) -> float:
        """Time spent, resumed runs included."""
        return self._before + time.perf_counter() - self._started

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint."""
        whole = [path.parent for path in self._folder.glob(f"checkpoint-*/{_WHOLE}")]
        return max(whole, key=_step, default=None)

    def resume(self) -> str | None:
        """Remove the incomplete checkpoints of a killed process; return the checkpoint to resume from."""
        process, newest = this_process(), self.newest()
        if process.is_main_process:
            for path in self._folder.glob("checkpoint-*"):
                if not (path / _WHOLE).is_file():
                    shutil.rmtree(path)
            if newest is not None:
                self._point_at_best(newest)
        process.wait_for_everyone()
        if newest is None:
            return None
        known = json.loads((newest / _WHOLE).read_text(encoding="utf-8"))
        self._before, self.trainer.first_loss, self.over = known["seconds"], known["first_loss"], known["over"]
        return str(newest)

    def _point_at_best(self, checkpoint: Path) -> None:
        """Correct the path of the best checkpoint: the folder may have been moved."""
        path = checkpoint / "trainer_state.json"
        state = json.loads(path.read_text(encoding="utf-8"))
        if state["best_model_checkpoint"] is not None:
            state["best_model_checkpoint"] = str(self._folder / Path(state["best_model_checkpoint"]).name)
            write_text(path, json.dumps(state, indent=1))

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **_: Any
    ) -> None:
        """Take the score before training as the best so far."""
        if state.global_step == 0:
            state.best_metric = metrics["eval_loss"]

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark the checkpoint as complete, and remove all but the newest and the best."""
        if state.is_world_process_zero:
            marker = {
                "seconds": self.seconds,
                "first_loss": self.trainer.first_loss,
                "over": control.should_training_stop,
            }
            newest = self._folder / f"checkpoint-{state.global_step}"
            write_text(newest / _WHOLE, json.dumps(marker))
            best = Path(state.best_model_checkpoint or newest).name
            for path in self._folder.glob("checkpoint-*"):
                if path.name not in (newest.name, best):
                    # The mark first: a half removed checkpoint is incomplete too.
                    (path / _WHOLE).unlink(missing_ok=True)
                    shutil.rmtree(path)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
