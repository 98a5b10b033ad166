"""How much memory is free, and what is free but still held."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

CPU_TOKENS = 1024
_MMAP_THRESHOLD = -3
"""The number of that setting in ``malloc.h``."""
_LARGE_BYTES = 1 << 20
_SMALL_GPU = 4 << 30
"""Bytes taken as free where the device does not say."""


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None  # not glibc
    return trim


def release() -> None:
    """Give memory that the allocator keeps for later back to the system, where the C library can (glibc).

    Activations come and go by the ten megabytes, between tensors that stay: what glibc keeps of them was a quarter
    of a compression's peak on the GPT-2 shape.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


def return_at_once() -> None:
    """Let the allocator give large blocks back to the system as soon as they are free, where the C library can (glibc).

    By itself it learns to keep blocks of up to 32 MB, which is faster, and which takes hundreds of megabytes.
    """
    if _trim() is not None:
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)


def batch_tokens(device: torch.device, channels: int) -> int:
    """Return how many tokens to run at once.

    A processor is fastest where activations stay in its cache. A GPU takes a power of two such that activations fill an
    eighth of its free memory, 65,536 at most.

    Args:
        channels: how many numbers a token holds meanwhile.
    """
    if device.type == "cpu":
        return CPU_TOKENS
    most = free(device) // (8 * 4 * channels)
    return min(max(1 << max(most, 1).bit_length() - 1, CPU_TOKENS), 1 << 16)


def free(device: torch.device) -> int:
    """Return how many bytes a device other than the processor has left; 4 GiB where it does not say."""
    if device.type == "cuda" and torch.cuda.is_available():
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    return _SMALL_GPU


def available() -> int:
    """Return how many bytes can still be taken: of the machine, or of the container (cgroup 2) if that has fewer.

    Where the system does not say (Linux does), half of the machine's memory; where it does not say that, no bound.
    """
    bounds = []
    with suppress(OSError, ValueError, KeyError):
        bounds.append(1024 * _figures(Path("/proc/meminfo"))["MemAvailable"])
    with suppress(OSError, ValueError, KeyError):
        group = Path("/sys/fs/cgroup")
        most, taken = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        bounds.append(most - taken + _figures(group / "memory.stat")["inactive_file"])  # that cache goes when asked
    with suppress(OSError, ValueError, AttributeError):
        bounds = bounds or [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2]
    return max(0, min(bounds, default=sys.maxsize))


def _figures(file: Path) -> dict[str, int]:
    """The numbers of a file of lines such as ``MemAvailable:  123 kB``."""
    return {name: int(figure) for name, figure in re.findall(r"^(\w+):?\s+(\d+)", file.read_text(), re.MULTILINE)}
