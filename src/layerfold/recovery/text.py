"""The training and validation text of a recovery."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from layerfold.checkpoint.model import Model, default_corpus
from layerfold.errors import InputError
from layerfold.progress import SILENT, Progress
from layerfold.recovery.base import LEARNING_RATES, Recovery
from layerfold.text.corpora import read_corpus
from layerfold.text.windows import TokenWindows, cut_windows

_CONTEXT = 256


@dataclass(frozen=True)
class TrainingText:
    """Windows of the ``train`` and the ``validation`` split.

    Attributes:
        train: full windows only, without padding; the documents in a seeded order.
        steps: number of optimiser steps.
        tokens: number of tokens in those steps.
        seed: seed of the order of documents, and of the windows in every further reading.
    """

    train: TokenWindows
    validation: TokenWindows
    steps: int
    tokens: int
    batch_size: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Return what identifies the text."""
        return {
            "corpus": self.train.corpus,
            "corpus_sha256": self.train.corpus_sha256,
            "context": self.train.context,
            "seed": self.seed,
            "tokens_sha256": self.train.sha256,
            "validation_corpus_sha256": self.validation.corpus_sha256,
            "validation_tokens_sha256": self.validation.sha256,
        }

    def shortened(self, fraction: float) -> TrainingText:
        """Return the same text with fewer steps, at least one."""
        steps = max(1, round(self.steps * fraction))
        return replace(self, steps=steps, tokens=steps * self.tokens // self.steps)


def training_text(model: Model, recovery: Recovery, seed: int, progress: Progress = SILENT) -> TrainingText:
    """Read and cut the text of a recovery, and note its length.

    Raises:
        InputError: a context beyond the model's, or fewer tokens than one step needs.
        CorpusError: a text shorter than one window.
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"seed {seed}; accepted: 0 ... {2**32 - 1}")
    context = min(_CONTEXT, model.decoder.context) if recovery.context is None else recovery.context
    if context > model.decoder.context:
        raise InputError(f"context {context}; accepted: 2 ... {model.decoder.context} (the model's maximum)")
    a_step = recovery.batch_size * context
    if recovery.tokens < a_step:
        raise InputError(
            f"tokens {recovery.tokens:,}; accepted: {a_step:,} or more, one step of {recovery.batch_size} windows "
            f"(batch_size) of {context} tokens (context)"
        )
    steps = recovery.tokens // a_step
    name = recovery.corpus or default_corpus(model)
    tokenizer = model.require_tokenizer()
    splits = read_corpus(name)
    text = splits.split("train")
    cut = cut_windows(text, tokenizer, context=context, limit_tokens=steps * a_step, seed=seed, whole=True)
    progress.note(f"training: {text.read(int(cut.lengths.sum()), steps * a_step)}")
    validation = cut_windows(
        splits.split("validation"), tokenizer, context=context, limit_tokens=recovery.validation_tokens, seed=seed
    )
    for windows in (cut, validation):
        model.decoder.check_ids(windows.input_ids)
    return TrainingText(cut, validation, steps, steps * a_step, recovery.batch_size, seed)


def settings(recovery: Recovery, text: TrainingText, teacher: Model | None) -> dict[str, Any]:
    """Return all that determines a recovery's outcome besides the model, as JSON."""
    return {
        **recovery.resolved(),
        **text.to_json(),
        **({} if recovery.learning_rate is not None else {"learning_rates": list(LEARNING_RATES)}),
        "teacher_sha256": teacher.sha256 if teacher is not None and recovery.needs_teacher else None,
    }


def training_windows(text: TrainingText) -> list[dict[str, Tensor]]:
    """Return the windows of all steps in the order of training.

    The first reading follows the (shuffled) documents; every further one has a seeded order of windows.
    """
    rows, length = len(text.train), text.steps * text.batch_size
    order = [torch.arange(rows)]
    for reading in range(1, math.ceil(length / rows)):
        order.append(torch.randperm(rows, generator=torch.Generator().manual_seed(text.seed + reading)))
    windows = windows_of(text.train)
    return [windows[index] for index in torch.cat(order)[:length].tolist()]


def windows_of(windows: TokenWindows) -> list[dict[str, Tensor]]:
    """Return windows as the Trainer reads them, each with its length."""
    pairs = zip(windows.input_ids, windows.lengths, strict=True)
    return [{"input_ids": input_ids, "length": length} for input_ids, length in pairs]
