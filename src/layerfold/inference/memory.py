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
