"""Recoveries, one file each, by their names in recipes and commands; `run` runs them."""

from layerfold.recovery.base import Recovery
from layerfold.recovery.distill import Distill
from layerfold.recovery.finetune import Finetune
from layerfold.recovery.lowrank import LowRank

RECOVERIES: dict[str, type[Recovery]] = {kind.name: kind for kind in (Finetune, Distill, LowRank)}

__all__ = ["RECOVERIES", "Distill", "Finetune", "LowRank", "Recovery"]
