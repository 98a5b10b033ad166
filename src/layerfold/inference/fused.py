"""The logarithm of a softmax's sum over a vocabulary in one GPU kernel, which writes no logits.

The plain way writes a tile of logits, and reads it three times: of a small model that takes as long as all its blocks.
The kernel keeps each tile in registers, as FlashAttention does (Dao et al., 2022, section 3.1: the running maximum and
sum of a row).
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

_ROWS, _COLUMNS, _STEP = 128, 256, 64
"""Tokens and vocabulary entries of a tile, and channels that are multiplied at a time."""

_STAGE_BYTES = 2 * _STEP * (_ROWS + _COLUMNS)
_SPARE_BYTES = 4096


def available(weight: Tensor) -> bool:
    """Whether the kernel takes a head's weight.

    It does in half precision on an NVIDIA GPU of compute capability 8.0 or more whose shared memory holds two tiles:
    A100, H100 and H200, but no GeForce.
    """
    return (
        weight.is_cuda
        and weight.dtype in (torch.bfloat16, torch.float16)
        and weight.stride(1) == 1
        and torch.version.hip is None
        and importlib.util.find_spec("triton") is not None
        and torch.cuda.get_device_capability(weight.device) >= (8, 0)
        and _stages(weight.device) >= 2
    )


def _stages(device: torch.device) -> int:
    """How many tiles are copied ahead: as many as shared memory holds, four at most."""
    memory: int = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
    return min(4, (memory - _SPARE_BYTES) // _STAGE_BYTES)


def log_partition(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return log sum_v exp(w_v h + b_v) of each state, (tokens,) float32. Products are added up in float32.

    Args:
        hidden: (tokens, d_model), of the weight's dtype.
        weight: (vocabulary, d_model).
        bias: (vocabulary,), or None.
    """
    found = hidden.new_empty(len(hidden), dtype=torch.float32)
    if len(hidden):
        from layerfold.inference.kernel import kernel

        hidden = hidden.contiguous()
        with torch.cuda.device(hidden.device):
            kernel[(-(-len(hidden) // _ROWS),)](
                hidden,
                weight,
                weight if bias is None else bias,
                found,
                len(hidden),
                len(weight),
                weight.stride(0),
                hidden.shape[1],
                bias is not None,
                _ROWS,
                _COLUMNS,
                _STEP,
                num_warps=8,
                num_stages=_stages(hidden.device),
            )
    return found
