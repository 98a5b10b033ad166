"""Tensors in temporary files that are mapped into memory.

They are read and written like any others. The system keeps of them in memory what it has room for, and writes the rest
to the disk: a model can be larger than the machine's memory.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from layerfold.errors import OutputError

LEAST_BYTES = 1 << 20
"""Smaller tensors stay in memory: each file takes a mapping, and systems allow some ten thousand of them."""

_ADDRESSES: set[int] = set()
"""Where the files are mapped."""


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor is in such a file, or a view of one that is."""
    return tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() in _ADDRESSES


@torch.no_grad()
def mapped(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a copy of a tensor in a file of its own, laid out alike; a small one in memory.

    The file has no name, and goes with the tensor.

    Args:
        tensor: on any device.
        dtype: of the copy; None keeps the tensor's own.

    Raises:
        OutputError: the disk is full, or no file can be made.
    """
    tensor, dtype = tensor.detach(), dtype or tensor.dtype
    axes = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    made = _empty([tensor.shape[axis] for axis in axes], dtype)
    made = made.permute([axes.index(axis) for axis in range(len(axes))])
    return made.copy_(tensor)


def cloned(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor, mapped where that one is."""
    return mapped(tensor) if is_mapped(tensor) else tensor.detach().clone()


def beside(old: Tensor, new: Tensor) -> Tensor:
    """Return what is to take a tensor's place: a mapped copy where that one is mapped, otherwise the new one itself."""
    return mapped(new) if is_mapped(old) and not is_mapped(new) else new


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    size = dtype.itemsize * torch.Size(shape).numel()
    if size < LEAST_BYTES or not size:
        return torch.empty(shape, dtype=dtype)
    try:
        with tempfile.TemporaryFile("w+b", buffering=0) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # so a full disk raises an error here
            else:
                file.truncate(size)
            memory = mmap.mmap(file.fileno(), size)
    except OSError as error:
        where = tempfile.gettempdir()
        raise OutputError(
            f"weights of {size:,} bytes cannot be written to a file in {where!r}: {error}; accepted: a folder with "
            "room for them as TMPDIR, or --offload never"
        ) from error
    made = torch.frombuffer(memory, dtype=dtype).view(shape)
    _ADDRESSES.add(address := made.untyped_storage().data_ptr())
    weakref.finalize(memory, _ADDRESSES.discard, address)
    return made
