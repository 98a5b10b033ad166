"""Tensors of the length of a text, in files without a name."""

from __future__ import annotations

import errno
import gc
import math
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import refused

from layerfold.errors import OutputError
from layerfold.inference.spool import Spool, Stowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_batches_come_back_as_they_were_written_in_float32(dtype: torch.dtype) -> None:
    values = torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    spool = Spool(values.shape)
    for batch in (slice(4, 7), slice(0, 2), slice(2, 4)):
        spool[batch] = values[batch]
    for batch in (slice(0, 7), slice(1, 5), slice(6, 7), slice(3, 100), slice(None)):
        found = spool[batch]
        assert found.dtype == torch.float32
        assert torch.equal(found, values[batch].float())
    assert spool.shape == (7, 3, 5)


def test_what_is_written_replaces_what_was_there_views_by_their_values_and_what_is_read_is_a_copy() -> None:
    spool, values = Spool((6, 4)), torch.arange(24.0).view(4, 6)
    spool[0:6] = values.T
    assert torch.equal(spool[0:6], values.T)
    spool[1:2] = torch.ones(1, 4)
    spool[0:6].fill_(9)
    assert torch.equal(spool[0:6], torch.cat([values.T[:1], torch.ones(1, 4), values.T[2:]]))


def test_the_file_goes_with_the_object_and_has_no_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[Any] = []
    make = tempfile.TemporaryFile

    def watched(*args: Any, **settings: Any) -> Any:
        made.append(make(*args, **settings, dir=tmp_path))
        return made[-1]

    monkeypatch.setattr(tempfile, "TemporaryFile", watched)
    spool = Spool((2, 3))
    spool[0:2] = torch.ones(2, 3)
    assert os.fstat(made[0].fileno()).st_size == 24
    assert not list(tmp_path.iterdir())
    del spool
    assert made[0].closed


def test_reading_what_was_never_written_is_an_error() -> None:
    spool = Spool((4, 2))
    spool[0:2] = torch.ones(2, 2)
    with pytest.raises(OutputError, match="ends before what was written"):
        spool[1:3]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", Path("/dev/full").open)
    spool = Spool((4, 2))
    with refused(OutputError, r"^activations cannot be written to a temporary file in '.*': .*space"):
        spool[0:4] = torch.ones(4, 2)
    del spool
    gc.collect()  # closing it does not fail once more: an exception that nobody sees would be a warning


def test_a_disk_that_takes_a_part_is_asked_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        def __init__(self, file: Any) -> None:
            self.seek, self.readinto, self.close, self._write = file.seek, file.readinto, file.close, file.write

        def write(self, data: Any) -> Any:
            return self._write(data[:5])

    make = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda *args, **settings: Slow(make(*args, **settings)))
    spool = Spool((3, 3))
    spool[0:3] = torch.arange(9.0).view(3, 3)
    assert torch.equal(spool[0:3], torch.arange(9.0).view(3, 3))


def test_where_no_file_can_be_made_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **settings: Any) -> Any:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(OutputError, match=r"^no temporary file can be made: .*Permission denied$"):
        Spool((1, 1))


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.detach().reshape(-1).view(torch.uint8).tolist()


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """What the memory behind tensors takes."""
    return sum({each.data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


class TestStowed:
    """Weights that wait in a file."""

    @pytest.fixture
    def tensors(self) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        values = [torch.randn(shape, generator=generator) for shape in ((5, 7), (3,), (4, 2, 6), ())]
        values += [values[0].T, torch.tensor([math.nan, -0.0, math.inf]), torch.empty(0, 3)]
        values += [torch.randn(6, 4, generator=generator).to(dtype) for dtype in (torch.bfloat16, torch.float64)]
        parameters: list[torch.Tensor] = [torch.nn.Parameter(each) for each in values]
        return [*parameters, torch.arange(9) > 4, torch.tensor([2**53 + 1])]

    def test_what_comes_back_is_equal_to_the_bit_and_laid_out_alike(self, tensors: list[torch.Tensor]) -> None:
        before = [(bits(each), each.stride(), each.dtype) for each in tensors]
        stowed = Stowed(tensors)
        for _ in range(2):
            stowed.stow()
            stowed.stow()
            stowed.fetch()
            stowed.fetch()
            for tensor, (values, stride, dtype) in zip(tensors, before, strict=True):
                assert bits(tensor) == values
                assert (tensor.stride(), tensor.dtype) == (stride, dtype)

    def test_what_is_stowed_keeps_its_shape_and_frees_its_memory(self) -> None:
        weight = torch.nn.Parameter(torch.randn(64, 32))
        modules = [torch.nn.Linear(32, 64), torch.nn.Linear(32, 64)]
        for module in modules:
            module.weight = weight
        tensors = [each for module in modules for each in module.parameters()]
        stowed = Stowed(tensors)
        assert stowed.bytes == storage_bytes(tensors) == 4 * (64 * 32 + 2 * 64)
        stowed.stow()
        assert storage_bytes(tensors) == 3 * 4
        assert [each.shape for each in tensors] == [(64, 32), (64,), (64, 32), (64,)]
        stowed.fetch()
        assert modules[0].weight is modules[1].weight is weight
        assert storage_bytes(tensors) == stowed.bytes

    def test_nothing_is_written_before_it_is_needed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tempfile, "TemporaryFile", None)
        Stowed([torch.ones(3)]).fetch()
        Stowed([]).fetch()

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
    def test_a_full_disk_is_said_in_one_line_and_loses_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        values = torch.ones(4, 2)
        stowed = Stowed([values])
        monkeypatch.setattr(tempfile, "TemporaryFile", Path("/dev/full").open)
        with pytest.raises(OutputError, match=r"^weights cannot be written to a temporary file in '.*': .*space"):
            stowed.stow()
        assert torch.equal(values, torch.ones(4, 2))
