"""Tensors in temporary files: of the length of a text, a batch at a time; and weights, while nothing uses them."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from layerfold.errors import OutputError
from layerfold.memory import room
from layerfold.memory.mapped import is_mapped
from layerfold.model import offload
from layerfold.model.decoder import Decoder

_PROCESSOR = torch.device("cpu")


class _File:
    """A temporary file without a name, which goes with the object.

    Args:
        what: is written to it, for messages.

    Raises:
        OutputError: no file can be made.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        try:
            # Without a buffer, as one that a full disk does not take would be written once more on closing.
            self._file = tempfile.TemporaryFile("w+b", buffering=0)  # noqa: SIM115 (goes with the object)
        except OSError as error:
            raise OutputError(f"no temporary file can be made: {error}") from error
        weakref.finalize(self, self._file.close)

    def read(self, place: int, buffer: memoryview) -> None:
        """Fill a buffer of bytes with what was written from a place on."""
        self._file.seek(place)
        while buffer:
            read = self._file.readinto(buffer) or 0
            if not read:
                raise OutputError(f"the temporary file of {self._what} ends before what was written to it")
            buffer = buffer[read:]

    def write(self, place: int, values: memoryview) -> None:
        """Write bytes from a place on."""
        try:
            self._file.seek(place)
            while values:
                values = values[self._file.write(values) :]
        except OSError as error:
            where = tempfile.gettempdir()
            raise OutputError(f"{self._what} cannot be written to a temporary file in {where!r}: {error}") from error


class Spool:
    """A tensor of fixed shape in a temporary file, so that memory does not grow with it.

    Indexed by slices of its first dimension, with step 1. The file has no name and goes with the object. What belongs
    to a GPU stays in its memory while an eighth of what is free there holds it, and in the machine's otherwise.

    Args:
        shape: (windows, ...).
        dtype: of the values.
        device: where rows are wanted.
    """

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device = _PROCESSOR
    ) -> None:
        self.shape = torch.Size(shape)
        self._dtype, self._device = dtype, device
        self._row_bytes = dtype.itemsize * self.shape[1:].numel()
        self._values: Tensor | None = None
        if device.type != "cpu":
            fits = self.shape[0] * self._row_bytes <= room.free(device) // 8
            self._values = torch.empty(self.shape, dtype=dtype, device=device if fits else _PROCESSOR)
        else:
            self._file = _File("activations")

    def __getitem__(self, rows: slice) -> Tensor:
        """Return rows that were written before, as a copy."""
        if self._values is not None:
            return self._values[rows].to(self._device, copy=True)
        start, stop, _ = rows.indices(self.shape[0])
        buffer = bytearray((stop - start) * self._row_bytes)
        self._file.read(start * self._row_bytes, memoryview(buffer))
        return torch.frombuffer(buffer, dtype=self._dtype).view(stop - start, *self.shape[1:])

    def __setitem__(self, rows: slice, values: Tensor) -> None:
        """Write rows.

        Raises:
            OutputError: the disk is full.
        """
        if self._values is not None:
            self._values[rows] = values.to(self._values)
            return
        start, _, _ = rows.indices(self.shape[0])
        self._file.write(start * self._row_bytes, _bytes(values.to(self._dtype).contiguous()))


class Stowed:
    """Tensors whose values are in memory only between `fetch` and `stow`, and in a temporary file otherwise.

    They stay the same objects, of the same shape, so that what is tied stays tied. What comes back is equal to the bit
    and laid out alike. The values are in memory to begin with, and the file is written by the first `stow`.

    Args:
        tensors: parameters and buffers that nothing writes into from now on. One that is given twice is stored once.
            Mapped ones are in files already, and stay as they are.

    Attributes:
        bytes: what the values take.
        here: whether they are in memory.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        distinct = {id(tensor): tensor for tensor in tensors}.values()
        self._tensors = [each for each in distinct if each.numel() and not is_mapped(each)]
        # A transposed tensor is stored as it lies in memory: products may differ in the last bit by the layout.
        self._axes = [sorted(range(each.dim()), key=each.stride, reverse=True) for each in self._tensors]
        self.bytes = sum(each.nbytes for each in self._tensors)
        self._file: _File | None = None
        self.here = True

    @torch.no_grad()
    def stow(self) -> None:
        """Free the memory.

        Raises:
            OutputError: the disk is full.
        """
        if not self.here:
            return
        if self._file is None:
            file, place = _File("weights"), 0
            for tensor, axes in zip(self._tensors, self._axes, strict=True):
                file.write(place, _bytes(tensor.detach().permute(axes).contiguous()))
                place += tensor.nbytes
            self._file = file
        for tensor in self._tensors:
            offload.put_(tensor, tensor.new_zeros(()).expand(tensor.shape))  # the shape, without the values
        self.here = False
        room.release()

    @torch.no_grad()
    def fetch(self) -> None:
        """Bring the values back into memory.

        Raises:
            OutputError: the file ends too early.
        """
        if self.here or self._file is None:
            return
        place = 0
        for tensor, axes in zip(self._tensors, self._axes, strict=True):
            values = torch.empty([tensor.shape[axis] for axis in axes], dtype=tensor.dtype)
            self._file.read(place, _bytes(values))
            place += tensor.nbytes
            offload.put_(tensor, values.permute([axes.index(axis) for axis in range(len(axes))]).to(tensor.device))
        self.here = True


def _bytes(values: Tensor) -> memoryview:
    """The memory of a contiguous tensor, or of a copy of one that a GPU holds."""
    return values.cpu().view(-1).view(torch.uint8).numpy().data.cast("B")


class Apart:
    """A decoder whose own tensors, those that no other has, can wait in a temporary file.

    Args:
        decoder: nothing writes into its own tensors from now on.
        beside: decoders that it may share tensors with.

    Attributes:
        own: the tensors, in memory until they are stowed.
    """

    def __init__(self, decoder: Decoder, *beside: Decoder) -> None:
        self.decoder = decoder
        shared = {id(tensor) for other in beside for tensor in _tensors(other)}
        self.own = Stowed(tensor for tensor in _tensors(decoder) if id(tensor) not in shared)


def _tensors(decoder: Decoder) -> Iterator[Tensor]:
    yield from decoder.model.parameters()
    yield from decoder.model.buffers()
