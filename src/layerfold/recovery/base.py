"""The base of all recoveries: a frozen dataclass that describes training on equal terms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, get_args

import torch
from torch import Tensor

from layerfold.errors import InputError, check_one_of
from layerfold.model.decoder import Decoder
from layerfold.settings import check_least, settings_of

Schedule = Literal["linear", "cosine", "constant"]
LEARNING_RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
FIRST_LEARNING_RATE = 1e-3
"""The search for a learning rate tries this one first, then its neighbours, downhill."""

IGNORED = -100
"""Target of a position without a next token, as in torch's losses."""


class Outputs(Protocol):
    """Output of a causal LM: logits, (windows, context, vocabulary), and on request hidden states.

    These are n_blocks + 1 tensors (windows, context, d_model): the first block's input, then each block's output.
    """

    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None


@dataclass(frozen=True)
class Loss:
    """The loss of one batch: the objective, and its language-model part, both in nats per token."""

    objective: Tensor
    language_model: Tensor


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """Train a model on the ``train`` split of a corpus, and keep the weights that did best on its ``validation`` split.

    AdamW over packed windows without padding; dropout is off. A model that training does not improve keeps its weights.
    In the patterns of `freeze`, ``*`` matches any characters and ``?`` any one. The search for a learning rate tries
    `LEARNING_RATES`.

    Attributes:
        tokens: training tokens, rounded down to whole steps; shorter text is read again in another order.
        corpus: training text; by default the model's own.
        context: length of the text's windows in tokens; by default the model's maximum, 256 at most.
        batch_size: windows of a step, over all devices.
        accumulation: number of pieces in which a step's windows are run, to save memory.
        learning_rate: highest learning rate; by default chosen on validation text, by short runs.
        search_fraction: length of such a run, as a fraction of `tokens`.
        warmup: fraction of the steps in which the learning rate rises to its highest.
        schedule: how it falls afterwards: ``linear`` or ``cosine`` to zero, or ``constant``.
        weight_decay: weight decay of AdamW, of weights but not of biases and norms.
        clip: largest norm of the gradient.
        freeze: names of tensors that are not trained, as ``*.wte.*``.
        validation_tokens: validation tokens.
        evaluations: number of times, evenly spread, that validation text is scored and a checkpoint written; the last
            at the end.
        patience: stop after this many evaluations without a better one; by default train to the end.
        gradient_checkpointing: compute activations again for the gradients instead of keeping them: less memory, more
            time, the same results.
        report_to: tracker of transformers' Trainer, as ``tensorboard`` or ``wandb``; it changes no figure.
    """

    tokens: int
    corpus: str | None = None
    context: int | None = None
    batch_size: int = 4
    accumulation: int = 1
    learning_rate: float | None = None
    search_fraction: float = 0.25
    warmup: float = 0.1
    schedule: Schedule = "linear"
    weight_decay: float = 0.0
    clip: float = 1.0
    freeze: tuple[str, ...] = ()
    validation_tokens: int = 8192
    evaluations: int = 4
    patience: int | None = None
    gradient_checkpointing: bool = False
    report_to: str = "none"

    name: ClassVar[str]
    version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_least(self, tokens=1, batch_size=1, accumulation=1, evaluations=1, validation_tokens=2)
        if self.patience is not None and self.patience < 1:
            raise InputError(f"patience {self.patience}; accepted: 1 or more evaluations")
        if self.context is not None and self.context < 2:
            raise InputError(f"context {self.context}: at least 2 tokens are needed to predict one")
        if self.batch_size % self.accumulation:
            raise InputError(
                f"accumulation {self.accumulation}; accepted: a divisor of the batch_size, {self.batch_size}"
            )
        rate = self.learning_rate
        if rate is not None and not (0 < rate < math.inf):
            raise InputError(f"learning_rate {rate}; accepted: a number above 0")
        if not 0 < self.search_fraction <= 1:
            raise InputError(f"search_fraction {self.search_fraction}; accepted: above 0, at most 1")
        if not 0 <= self.warmup < 1:
            raise InputError(f"warmup {self.warmup}; accepted: a fraction of the steps, from 0 to below 1")
        if not (0 <= self.weight_decay < math.inf and 0 < self.clip < math.inf):
            raise InputError(
                f"weight_decay {self.weight_decay} and clip {self.clip}; accepted: 0 or more, and more than 0"
            )
        check_one_of("schedule", self.schedule, get_args(Schedule))

    @property
    def needs_teacher(self) -> bool:
        """Whether `loss` needs a teacher's outputs."""
        return False

    @property
    def needs_hidden_states(self) -> bool:
        """Whether `loss` needs the blocks' outputs."""
        return False

    @property
    def only_imitates(self) -> bool:
        """Whether the student learns from the teacher's outputs alone."""
        return False

    def loss(self, student: Outputs, input_ids: Tensor, teacher: Outputs | None, counterparts: tuple[int, ...]) -> Loss:
        """Return the loss of a batch of windows without padding, (windows, context) token ids.

        The default is the mean negative log-likelihood of each token given those before it.

        Args:
            teacher: the teacher's outputs for the same windows, where `needs_teacher`.
            counterparts: for each block of the student, the teacher's block whose output it should imitate.
        """
        logits, targets = student.logits.flatten(0, 1).float(), next_tokens(input_ids)
        loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED)
        return Loss(loss, loss.detach())

    def frozen(self, decoder: Decoder) -> set[str]:
        """Return the names of untrained tensors, in addition to those of `freeze`."""
        return set()

    def lacks(self, decoder: Decoder) -> str:
        """Say that a decoder lacks the tensors that this recovery trains; empty where it has them."""
        return ""

    def penalty(self, decoder: Decoder) -> Tensor | None:
        """Return a scalar to add to every batch's loss; None adds nothing."""
        return None

    def resolved(self) -> dict[str, Any]:
        """Return all settings that change figures, by name, as JSON."""
        settings = settings_of(self)
        del settings["report_to"], settings["gradient_checkpointing"]
        return {"name": self.name, "version": self.version} | settings


def log_probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the log-probabilities at every position, (windows * context, vocabulary), in float32."""
    return torch.log_softmax(logits.flatten(0, 1).float() / temperature, dim=-1)


def next_tokens(input_ids: Tensor) -> Tensor:
    """Return the next token of every position, (windows * context); `IGNORED` at the last of each window."""
    return torch.nn.functional.pad(input_ids[:, 1:], (0, 1), value=IGNORED).flatten()
