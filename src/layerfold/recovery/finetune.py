"""Fine-tuning: the language-model loss alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from layerfold.recovery.base import Loss, Outputs, Recovery, language_model_loss


@dataclass(frozen=True, kw_only=True)
class Finetune(Recovery):
    """Train on text, with the mean negative log-likelihood of each token given those before it."""

    name: ClassVar[str] = "finetune"

    def loss(self, student: Outputs, input_ids: Tensor, teacher: Outputs | None, counterparts: tuple[int, ...]) -> Loss:
        """Return the language-model loss."""
        return language_model_loss(student, input_ids)
