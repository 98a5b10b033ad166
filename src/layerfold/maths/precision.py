"""In which precision sums are held on a device."""

from __future__ import annotations

import torch


def widest(device: torch.device) -> torch.dtype:
    """Return the most precise floating-point type of a device: float64, which Apple's GPUs lack."""
    return torch.float32 if device.type == "mps" else torch.float64
