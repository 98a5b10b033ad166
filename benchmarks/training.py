"""Training speed of a recovery against a bare PyTorch loop over the same model, batches and optimiser."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from shape import Figures, arguments, medians, report, seconds
from transformers import get_linear_schedule_with_warmup

from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import POCKET, Model
from layerfold.recovery import Finetune
from layerfold.recovery.run import Run
from layerfold.recovery.text import TrainingText, training_text
from layerfold.recovery.trainer import RecoveryTrainer

ROUNDS, STEPS = 5, 6


def bare_loop(model: Model, recovery: Finetune, text: TrainingText) -> float:
    """Train as one writes it by hand (forward, backward, clip, step); return the seconds it took."""
    network = model.decoder.copy().model.train()
    started = time.perf_counter()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, round(recovery.warmup * text.steps), text.steps)
    for step in range(text.steps):
        ids = text.train.input_ids[step * text.batch_size : (step + 1) * text.batch_size]
        network(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), recovery.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return time.perf_counter() - started


def steps_alone(model: Model, recovery: Finetune, text: TrainingText, folder: Path) -> float:
    """Train by layerfold, without scoring validation text or writing checkpoints; return the seconds it took."""
    trainer = RecoveryTrainer(
        model.decoder.copy(),
        recovery,
        text,
        learning_rate=1e-3,
        folder=folder,
        checkpoints=False,
        tokenizer=None,
        teacher=None,
        counterparts=(),
        masked=(),
        callbacks=[],
    )
    return seconds(trainer.train)


def main() -> None:
    options = arguments(__doc__)
    rounds, steps = (1, 4) if options.quick else (ROUNDS, STEPS)
    model = load(POCKET)
    recovery = Finetune(tokens=steps * 8 * 256, batch_size=8, learning_rate=1e-3)
    text = training_text(model, recovery, seed=0)
    measured: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="layerfold-benchmark-") as name:
        for each in range(-1, rounds):  # the first only warms up
            folder = Path(name) / str(each)
            loop = bare_loop(model, recovery, text)
            alone = steps_alone(model, recovery, text, folder / "alone")
            whole = seconds(Run(model, recovery, folder / "whole", text=text))
            if each >= 0:
                measured.append(
                    {
                        "bare loop, tokens/s": text.tokens / loop,
                        "layerfold, tokens/s": text.tokens / alone,
                        "layerfold / bare loop": loop / alone,
                        "layerfold with validation and checkpoints / bare loop": loop / whole,
                    }
                )
    figures: Figures = {"rounds": rounds, "steps a round": steps, "tokens a step": text.tokens // steps}
    report("training", figures | medians(measured), options.json)


if __name__ == "__main__":
    main()
