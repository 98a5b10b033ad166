"""Models larger than the memory of the machine, or of the device that computes with them.

The weights wait in mapped files (`memory.mapped`). A processor computes with them there. Another device gets those of
a block while the block runs, and gives back what was edited; the embeddings, the last norm and the LM head stay on it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from layerfold.memory import room
from layerfold.memory.mapped import is_mapped, mapped
from layerfold.model.matrix import MASK

_DEVICE = "offload_device"
"""Attribute of a block whose weights wait elsewhere: the device that computes with them."""


@dataclass
class _Here:
    """A tensor that is on the device.

    Attributes:
        tensor: the parameter or buffer.
        rest: its values in the machine's memory.
        holders: number of blocks that keep it there.
    """

    tensor: Tensor
    rest: Tensor
    holders: int = 0


@dataclass
class _Hold:
    """A block that keeps its weights on the device.

    Attributes:
        block: the block.
        tensors: the ids of those that it had when it arrived.
        times: how many times it was asked for.
    """

    block: nn.Module
    tensors: list[int]
    times: int = 1


_HERE: dict[int, _Here] = {}
"""By the id of the parameter or buffer: blocks may share it, and so may decoders."""

_HOLDS: dict[int, _Hold] = {}
"""By the id of the block."""


@dataclass
class _Ahead:
    """A tensor that is being copied to a device before it is asked for.

    Attributes:
        version: how often it had been written into.
        values: the copy.
    """

    version: int
    values: Future[Tensor]


_AHEAD: MutableMapping[Tensor, _Ahead] = WeakTensorKeyDictionary()
"""By the parameter or buffer itself."""


def map_(model: nn.Module) -> None:
    """Move a model's weights and masks to mapped files, in place. What is tied stays tied."""
    room.return_at_once()
    for tensor in (*model.parameters(), *model.buffers()):
        if not is_mapped(tensor):
            tensor.data = mapped(tensor)


def offload_(model: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Let the weights of some blocks wait where they are until each runs on another device, and move all else there."""
    waiting = list(blocks)
    apart = {id(tensor) for block in waiting for tensor in _tensors(block)}
    for block in waiting:
        setattr(block, _DEVICE, device)
        block.register_forward_pre_hook(_before)
        block.register_forward_hook(_after, always_call=True)
    for tensor in _tensors(model):
        if id(tensor) not in apart:
            put_(tensor, tensor.detach().to(device))


def is_offloaded(block: nn.Module) -> bool:
    """Whether a block's weights wait elsewhere than on the device that computes with them."""
    return hasattr(block, _DEVICE)


def gathered_(blocks: Iterable[nn.Module]) -> None:
    """Stop offloading blocks: their weights stay where they are put."""
    for block in blocks:
        if is_offloaded(block):
            delattr(block, _DEVICE)


@contextmanager
def resident(blocks: Iterable[nn.Module], *, edited: bool = False) -> Iterator[None]:
    """Keep blocks' weights on the device that computes with them; does nothing for blocks that are not offloaded.

    Args:
        edited: whether something writes into them, or replaces them.
    """
    with ExitStack() as stack:
        for block in blocks:
            if is_offloaded(block):
                _arrive(block)
                stack.callback(_leave, block, edited)
        yield


def ahead(block: nn.Module) -> None:
    """Begin to copy a block's weights to the device that will compute with them: those of one block at a time."""
    if not is_offloaded(block):
        return
    device: torch.device = getattr(block, _DEVICE)
    begun = {id(each): _AHEAD.pop(each) for each in list(_AHEAD)}
    for tensor in _tensors(block):
        if id(tensor) not in _HERE and tensor.device != device:
            found = begun.get(id(tensor))
            _AHEAD[tensor] = found or _Ahead(tensor._version, _copier().submit(_copied, tensor.detach(), device))


def put_(tensor: Tensor, values: Tensor) -> None:
    """Give a parameter or buffer other values, on any device; it stays the same object."""
    tensor.data = values


def _before(block: nn.Module, _: Any) -> None:
    if is_offloaded(block) and "forward" not in block.__dict__:  # what replaces its forward needs no weights
        _arrive(block)


def _after(block: nn.Module, *_: Any) -> None:
    if id(block) in _HOLDS and "forward" not in block.__dict__:
        _leave(block, edited=False)


def _arrive(block: nn.Module) -> None:
    if (hold := _HOLDS.get(id(block))) is not None:
        hold.times += 1
        return
    device: torch.device = getattr(block, _DEVICE)
    hold = _Hold(block, [])
    try:
        for tensor in _tensors(block):
            if id(tensor) not in _HERE:
                if tensor.device == device:
                    continue
                rest = tensor.detach()
                put_(tensor, _taken(tensor, device))
                _HERE[id(tensor)] = _Here(tensor, rest)
            _HERE[id(tensor)].holders += 1
            hold.tensors.append(id(tensor))
    except BaseException:  # as where the device is full
        _release(hold)
        raise
    _HOLDS[id(block)] = hold


def _leave(block: nn.Module, edited: bool) -> None:
    hold = _HOLDS[id(block)]
    if edited:
        for here in map(_HERE.__getitem__, hold.tensors):
            here.rest.copy_(here.tensor.detach())
    hold.times -= 1
    if hold.times:
        return
    del _HOLDS[id(block)]
    _release(hold)
    for tensor in _tensors(block):
        if id(tensor) not in _HERE and tensor.device == getattr(block, _DEVICE):  # it was made there meanwhile
            put_(tensor, mapped(tensor.detach().cpu()))


def _release(hold: _Hold) -> None:
    for key in hold.tensors:
        here = _HERE[key]
        here.holders -= 1
        if not here.holders:
            put_(here.tensor, here.rest)
            del _HERE[key]


def _taken(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor's values on a device, those copied ahead where they are."""
    begun = _AHEAD.pop(tensor, None)
    if begun is None or begun.version != tensor._version:
        return tensor.detach().to(device)
    values = begun.values.result()
    if values.is_cuda:
        torch.cuda.current_stream(device).wait_stream(_stream(device))
        values.record_stream(torch.cuda.current_stream(device))
    return values


@functools.cache
def _copier() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "layerfold-offload")


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _copied(values: Tensor, device: torch.device) -> Tensor:
    """Return values on a device; a CUDA device goes on computing meanwhile."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return values.to(device)
    with torch.cuda.stream(_stream(device)):
        return values.pin_memory().to(device, non_blocking=True)


def _tensors(module: nn.Module) -> list[Tensor]:
    """The distinct parameters and buffers of a module, but for masks, which no block computes with."""
    buffers = [each for name, each in module.named_buffers() if not name.endswith(MASK)]
    return [*{id(each): each for each in (*module.parameters(), *buffers)}.values()]
