"""Memory that is free but still held."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


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
