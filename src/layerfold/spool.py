"""Tensors of the length of a text, in a file: they are read and written a batch at a time."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from layerfold.errors import OutputError


class Spool:
    """A float32 tensor of fixed shape in a temporary file, so that memory does not grow with it.

    Indexed by slices of its first dimension, with step 1. The file has no name and goes with the object.

    Args:
        shape: (windows, ...).
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = torch.Size(shape)
        self._row_bytes = 4 * self.shape[1:].numel()
        try:
            # Without a buffer, as one that a full disk does not take would be written once more on closing.
            self._file = tempfile.TemporaryFile("w+b", buffering=0)  # noqa: SIM115 (goes with the object)
        except OSError as error:
            raise OutputError(f"no temporary file can be made: {error}") from error
        weakref.finalize(self, self._file.close)

    def __getitem__(self, rows: slice) -> Tensor:
        """Return rows that were written before, as a copy."""
        start, stop, _ = rows.indices(self.shape[0])
        buffer = bytearray((stop - start) * self._row_bytes)
        self._file.seek(start * self._row_bytes)
        if (self._file.readinto(buffer) or 0) < len(buffer):
            raise OutputError("the temporary file of activations ends before what was written to it")
        return torch.frombuffer(buffer, dtype=torch.float32).view(stop - start, *self.shape[1:])

    def __setitem__(self, rows: slice, values: Tensor) -> None:
        """Write rows.

        Raises:
            OutputError: the disk is full.
        """
        start, _, _ = rows.indices(self.shape[0])
        try:
            self._file.seek(start * self._row_bytes)
            left = values.float().contiguous().view(-1).numpy().data.cast("B")
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            where = tempfile.gettempdir()
            raise OutputError(f"activations cannot be written to a temporary file in {where!r}: {error}") from error
