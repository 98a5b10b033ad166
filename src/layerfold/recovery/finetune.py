"""Fine-tuning: the language-model loss alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from layerfold.recovery.base import Recovery


@dataclass(frozen=True, kw_only=True)
class Finetune(Recovery):
    """Train on text, with the mean negative log-likelihood of each token given those before it."""

    name: ClassVar[str] = "finetune"
