"""A recovery's settings as the Trainer's arguments, and their checks before anything is written."""

from __future__ import annotations

import fnmatch
import math
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations

from layerfold.errors import InputError, one_of
from layerfold.model.decoder import Decoder
from layerfold.recovery.base import Recovery
from layerfold.recovery.processes import on_cpu, this_process
from layerfold.recovery.text import TrainingText

_CURVE_POINTS = 200
"""Approximate number of points in a long run's curve."""


def check(decoder: Decoder, recovery: Recovery) -> None:
    """Raise InputError for settings that do not fit the model, the machine or the processes."""
    frozen(decoder, recovery)
    _windows_a_piece(recovery)
    installed = {"none", "all", *get_available_reporting_integrations()}
    if recovery.report_to not in installed:
        raise InputError(f"report_to {one_of(recovery.report_to, installed)} (a tracker's package must be installed)")


def frozen(decoder: Decoder, recovery: Recovery) -> set[str]:
    """Return the names of the untrained tensors.

    Raises:
        InputError: a pattern that matches no name, or no tensor left to train.
    """
    parameters = dict(decoder.model.named_parameters(remove_duplicate=False))
    names = recovery.frozen(decoder)
    for pattern in recovery.freeze:
        matched = fnmatch.filter(parameters, pattern)
        if not matched:
            raise InputError(f"freeze {one_of(pattern, list(parameters)[:8])}, ...; * matches any characters")
        names.update(matched)
    # Either name of a tensor with two freezes it.
    kept = {id(parameters[name]) for name in names}
    if all(id(parameter) in kept for parameter in parameters.values()) and not recovery.lacks(decoder):
        raise InputError(f"freeze {', '.join(recovery.freeze)} leaves nothing to train")
    return names


def training_arguments(
    recovery: Recovery,
    text: TrainingText,
    learning_rate: float,
    folder: Path,
    checkpoints: bool,
    autocast: bool = False,
) -> TrainingArguments:
    """Return the Trainer's arguments.

    Args:
        autocast: whether to compute in half precision, with float32 weights.
    """
    pieces = _windows_a_piece(recovery)
    point = max(1, text.steps // _CURVE_POINTS)
    # Whole points between checkpoints: a run resumed within a point would lose the point's first part.
    between = point * math.ceil(text.steps / recovery.evaluations / point)
    return quiet_arguments(
        output_dir=str(folder),
        max_steps=text.steps,
        **half_precision(autocast),
        per_device_train_batch_size=pieces,
        per_device_eval_batch_size=pieces,
        gradient_accumulation_steps=recovery.accumulation,
        learning_rate=learning_rate,
        lr_scheduler_type=recovery.schedule if recovery.schedule != "constant" else "constant_with_warmup",
        warmup_steps=round(recovery.warmup * text.steps),
        weight_decay=recovery.weight_decay,
        max_grad_norm=recovery.clip,
        seed=text.seed,
        eval_strategy="steps" if checkpoints else "no",
        save_strategy="steps" if checkpoints else "no",
        eval_steps=between,
        save_steps=between,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,
        logging_strategy="steps",
        logging_steps=point,
        report_to=recovery.report_to if checkpoints else "none",
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # masks and rotary tables never change
    )


def half_precision(wanted: bool) -> dict[str, bool]:
    """Return the arguments for computing in bfloat16, or in float16 on a GPU that lacks it, with float32 weights."""
    lacking = not on_cpu() and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(False)
    return {"bf16": wanted and not lacking, "fp16": wanted and lacking}


def quiet_arguments(**settings: Any) -> TrainingArguments:
    """Return arguments of a Trainer that prints nothing and trains with AdamW, on one device per process."""
    arguments = TrainingArguments(
        optim="adamw_torch",
        logging_nan_inf_filter=False,
        use_cpu=on_cpu(),
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        **settings,
    )
    # One device per process: `accelerate launch` starts a process for each device.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _windows_a_piece(recovery: Recovery) -> int:
    parts = recovery.accumulation * int(this_process().num_processes)
    if recovery.batch_size % parts:
        raise InputError(
            f"batch_size {recovery.batch_size}; accepted: a multiple of {parts}, "
            "accumulation times the number of processes"
        )
    return recovery.batch_size // parts
