"""Distillation: learn the teacher's distribution over the next token, not only the token itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from layerfold.errors import InputError
from layerfold.recovery.base import IGNORED, Loss, Outputs, Recovery, log_probabilities, next_tokens


@dataclass(frozen=True, kw_only=True)
class Distill(Recovery):
    """Train towards a teacher.

    The loss of a token is (1 - lm_weight) T^2 KL(teacher || student), both at temperature T, plus lm_weight times the
    language-model loss, plus hidden_weight times the mean over blocks of |s - t|^2 / |t|^2, where s is the
    output of a block of the student and t that of its counterpart in the teacher. The teacher runs beside the student,
    batch by batch: its logits are never stored.

    Attributes:
        temperature: T, which flattens both distributions.
        lm_weight: weight of the language-model loss, 0 to 1.
        hidden_weight: weight of the hidden states' term; 0 leaves it out.
        counterparts: for each block of the model, index of the teacher's block whose output it should imitate. None
            takes, for each kept block, the teacher's last block before the next kept one.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2; the hidden
    states' term after Jiao et al., "TinyBERT", 2020, equation 8, but relative to the teacher's norm.
    """

    temperature: float = 1.0
    lm_weight: float = 0.0
    hidden_weight: float = 0.0
    counterparts: tuple[int, ...] | None = None

    name: ClassVar[str] = "distill"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.temperature < math.inf:
            raise InputError(f"temperature {self.temperature}; accepted: a number above 0")
        if not 0 <= self.lm_weight <= 1:
            raise InputError(f"lm_weight {self.lm_weight}; accepted: 0 to 1")
        if not 0 <= self.hidden_weight < math.inf:
            raise InputError(f"hidden_weight {self.hidden_weight}; accepted: 0 or more")
        if self.counterparts is not None and any(index < 0 for index in self.counterparts):
            raise InputError(f"counterparts {list(self.counterparts)}; accepted: indices of the teacher's blocks")

    @property
    def needs_teacher(self) -> bool:
        """True: distillation is from a teacher."""
        return True

    @property
    def needs_hidden_states(self) -> bool:
        """Whether the loss has a term of hidden states."""
        return self.hidden_weight > 0

    @property
    def only_imitates(self) -> bool:
        """Whether the text's own tokens have no weight in the loss."""
        return self.lm_weight == 0

    def loss(self, student: Outputs, input_ids: Tensor, teacher: Outputs | None, counterparts: tuple[int, ...]) -> Loss:
        """Return the mixed loss."""
        assert teacher is not None
        log_student = log_probabilities(student.logits)
        language_model = nll_loss(log_student, next_tokens(input_ids), ignore_index=IGNORED)
        if self.temperature != 1:
            log_student = log_probabilities(student.logits, self.temperature)
        # All positions, the last of a window too: each has a distribution to learn.
        divergence = kl_divergence(teacher.logits.flatten(0, 1).float() / self.temperature, log_student)
        loss = (1 - self.lm_weight) * self.temperature**2 * divergence
        if self.lm_weight:
            loss = loss + self.lm_weight * language_model
        if self.needs_hidden_states:
            assert student.hidden_states is not None
            assert teacher.hidden_states is not None
            terms = [
                relative_square(student.hidden_states[own + 1], teacher.hidden_states[other + 1])
                for own, other in enumerate(counterparts)
            ]
            loss = loss + self.hidden_weight * torch.stack(terms).mean()
        return Loss(loss, language_model.detach())


def kl_divergence(logits: Tensor, log_student: Tensor) -> Tensor:
    """Mean KL(softmax(logits) || student) over positions, from (positions, vocabulary) each, in nats.

    Computed as cross-entropy less entropy, with few passes over the large tensors; no gradient flows to `logits`.
    """
    with torch.no_grad():
        probabilities = torch.softmax(logits, dim=-1)
        # The normaliser is any entry's logit less its log-probability; that of the largest cannot underflow.
        normaliser = logits.amax(-1) - probabilities.amax(-1).log()
        entropy = normaliser - (probabilities * logits).sum(-1)
    return -(probabilities * log_student).sum(-1).mean() - entropy.mean()


def relative_square(states: Tensor, targets: Tensor) -> Tensor:
    """Mean over positions of |states - targets|^2 / |targets|^2, each (windows, context, d_model)."""
    return ((states - targets).square().sum(-1) / targets.square().sum(-1).clamp_min(1e-12)).mean()
