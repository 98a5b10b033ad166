"""What a recovery did, as records and checkpoints keep it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, cast

from transformers import TrainerState

from layerfold.recovery.rates import Trial
from layerfold.recovery.text import TrainingText


@dataclass(frozen=True)
class Outcome:
    """What a recovery did.

    Attributes:
        method: the recovery's name.
        tokens: how many were trained on, those of the learning rate's search apart.
        search_tokens: how many that search took.
        seconds: of all of it, over all resumptions.
        learning_rate: the highest; None where there was nothing to learn.
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


def outcome_of(
    method: str,
    text: TrainingText,
    state: TrainerState,
    *,
    seconds: float,
    learning_rate: float | None,
    tried: list[Trial],
    parameters_trained: int,
) -> Outcome:
    """Read from the Trainer's state, and from the trials, what was done.

    Args:
        seconds: of the run itself.
    """
    a_step = text.train.context * text.batch_size
    return Outcome(
        method=method,
        tokens=state.global_step * a_step,
        search_tokens=sum(trial.tokens for trial in tried),
        seconds=seconds + sum(trial.seconds for trial in tried),
        learning_rate=learning_rate,
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
        parameters_trained=parameters_trained,
    )
