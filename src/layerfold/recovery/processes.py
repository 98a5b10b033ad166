"""The processes that train together, where several were launched; otherwise this one alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, str_to_bool

from layerfold.environment import device_of


def on_cpu() -> bool:
    """Whether training runs on the processor: there is no accelerator, or the launcher or the user asks for it."""
    if not torch.accelerator.is_available() or device_of().type == "cpu":
        return True
    return bool(str_to_bool(os.environ.get("ACCELERATE_USE_CPU") or "false"))


def this_process() -> PartialState:
    """Return accelerate's view of this process.

    The first call decides whether processes on the processor find each other: all of layerfold calls this.
    """
    return PartialState(cpu=on_cpu())


def is_main() -> bool:
    """Whether this is the process that writes: the only one, or the first of several."""
    return bool(this_process().is_main_process)


def from_main(make: Callable[[], Any]) -> Any:
    """Return, in all processes, what the function returns in the main one; the others do not call it."""
    made = [make() if is_main() else None]
    if this_process().num_processes > 1:
        broadcast_object_list(made)
    return made[0]
