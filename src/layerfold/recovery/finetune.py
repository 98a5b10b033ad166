"""Fine-tuning: the language-model loss alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import cross_entropy

from layerfold.recovery.base import IGNORED, Loss, Outputs, Recovery, next_tokens


@dataclass(frozen=True, kw_only=True)
class Finetune(Recovery):
    """Train on text, with the mean negative log-likelihood of each token given those before it."""

    name: ClassVar[str] = "finetune"
    needs_teacher: ClassVar[bool] = False

    def loss(self, student: Outputs, input_ids: Tensor, teacher: Outputs | None, counterparts: tuple[int, ...]) -> Loss:
        """Return the language-model loss."""
        loss = cross_entropy(student.logits.flatten(0, 1).float(), next_tokens(input_ids), ignore_index=IGNORED)
        return Loss(loss, loss.detach())
