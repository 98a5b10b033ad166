"""The text that a recovery trains on, and the text that it is judged by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from layerfold.checkpoint.model import Model, default_corpus
from layerfold.errors import InputError
from layerfold.progress import SILENT, Progress
from layerfold.recovery.base import LEARNING_RATES, Recovery
from layerfold.text.corpora import read_corpus
from layerfold.text.windows import Windows, cut_windows

_CONTEXT = 256


@dataclass(frozen=True)
class TrainingText:
    """Windows of the ``train`` and of the ``validation`` split.

    Attributes:
        train: whole windows alone, so that there is no padding; its documents in a seeded order.
        steps: how many optimiser steps the tokens asked for make.
        tokens: how many tokens those steps read.
        seed: orders the documents, and the windows whenever they are read again.
    """

    train: Windows
    validation: Windows
    steps: int
    tokens: int
    batch_size: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Return what says which text it is."""
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
        return TrainingText(
            self.train, self.validation, steps, steps * self.tokens // self.steps, self.batch_size, self.seed
        )


def training_text(model: Model, recovery: Recovery, seed: int, progress: Progress = SILENT) -> TrainingText:
    """Read and cut the text of a recovery, and tell how much there was.

    Raises:
        InputError: a context beyond the model's, or fewer tokens than one step takes.
        CorpusError: less text than one window.
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


class TrainingWindows(Dataset[dict[str, Tensor]]):
    """The windows in the order they are trained on, as many as the steps take.

    The first reading is in the order of the (shuffled) documents; each further one in a seeded order of windows.
    """

    def __init__(self, text: TrainingText) -> None:
        self._windows = text.train
        self._length = text.steps * text.batch_size
        self._seed = text.seed
        self._order: tuple[int, Tensor] = 0, torch.arange(len(text.train))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        reading, row = divmod(index, len(self._windows))
        if reading != self._order[0]:
            generator = torch.Generator().manual_seed(self._seed + reading)
            rows = len(self._windows)
            self._order = reading, torch.randperm(rows, generator=generator) if reading else torch.arange(rows)
        return {"input_ids": self._windows.input_ids[self._order[1][row]]}


class ValidationWindows(Dataset[dict[str, Tensor]]):
    """The windows of the validation text, each with its length."""

    def __init__(self, windows: Windows) -> None:
        self._windows = windows

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._windows.input_ids[index], "length": self._windows.lengths[index]}
