"""The processes that train together, where several were launched; otherwise this one."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState
from accelerate.utils import str_to_bool

from layerfold.environment import DEVICE_VARIABLE


def on_cpu() -> bool:
    """Whether training is on the processor: there is nothing else, or the launcher or the user said so."""
    if not torch.accelerator.is_available() or os.environ.get(DEVICE_VARIABLE) == "cpu":
        return True
    return bool(str_to_bool(os.environ.get("ACCELERATE_USE_CPU") or "false"))


def this_process() -> PartialState:
    """Return accelerate's view of this process.

    Whoever asks first decides whether processes on the processor find each other: all of layerfold asks here.
    """
    return PartialState(cpu=on_cpu())


def is_main() -> bool:
    """Whether this is the process that writes: the only one, or the first of those launched together."""
    return bool(this_process().is_main_process)
