"""Low-rank recovery: only the low-rank deltas of a model that shares FFNs are trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from layerfold.errors import InputError
from layerfold.model import deltas
from layerfold.model.decoder import Decoder
from layerfold.recovery.base import Loss, Outputs, Recovery
from layerfold.recovery.distill import Distill


@dataclass(frozen=True, kw_only=True)
class LowRank(Distill):
    """Train the A and B of W_l = W_c + A_l B_l, and nothing else.

    The loss is the language model's plus `penalty_weight` times the sum over all deltas of |A_l B_l|_F^2. With an
    `lm_weight` below 1, or a `hidden_weight`, the deltas learn from a teacher too, as in `Distill`.

    Attributes:
        penalty_weight: weight of the penalty, lambda; the published one by default.
    """

    lm_weight: float = 1.0
    penalty_weight: float = 1e-4

    name: ClassVar[str] = "lowrank"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.penalty_weight < math.inf:
            raise InputError(f"penalty_weight {self.penalty_weight}; accepted: 0 or more")

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss has a term of distillation."""
        return self.lm_weight < 1 or self.hidden_weight > 0

    def loss(self, student: Outputs, input_ids: Tensor, teacher: Outputs | None, counterparts: tuple[int, ...]) -> Loss:
        """Return the language-model loss, or with a teacher the mixed one."""
        kind = Recovery if teacher is None else Distill
        return kind.loss(self, student, input_ids, teacher, counterparts)

    def frozen(self, decoder: Decoder) -> set[str]:
        """Return all names except the deltas'."""
        trained = {f"{path}.{name}" for path in deltas.ranks(decoder) for name in "ab"}
        return {name for name, _ in decoder.model.named_parameters(remove_duplicate=False)} - trained

    def lacks(self, decoder: Decoder) -> str:
        """Say that a decoder has no deltas."""
        if any(deltas.ranks(decoder).values()):
            return ""
        return f"lowrank trains low-rank deltas, and {deltas.NONE}"

    def penalty(self, decoder: Decoder) -> Tensor | None:
        """Return the weighted sum of the deltas' squares."""
        factored = deltas.factored(decoder) if self.penalty_weight else {}
        squares = [module.square() for module in factored.values()]
        return self.penalty_weight * torch.stack(squares).sum() if squares else None
