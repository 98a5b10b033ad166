"""Recoveries, one file each, by the name they have in recipes and commands; `run` runs them."""

from layerfold.recovery.base import Recovery
from layerfold.recovery.distill import Distill
from layerfold.recovery.finetune import Finetune

RECOVERIES: dict[str, type[Finetune] | type[Distill]] = {Finetune.name: Finetune, Distill.name: Distill}

__all__ = ["RECOVERIES", "Distill", "Finetune", "Recovery"]
