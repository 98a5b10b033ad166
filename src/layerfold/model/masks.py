"""Masks: which zeros of a decoder's weights are to stay zeros.

A mask is a buffer beside the weight that it is of, so that it goes where the weight goes: through copies, into
training, away with a block that is dropped. It is no part of the state dict, and changes nothing that a model computes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from layerfold.errors import InputError
from layerfold.memory.mapped import beside
from layerfold.model.decoder import Decoder
from layerfold.model.matrix import MASK


def hold_(decoder: Decoder, kept: Mapping[str, Tensor]) -> None:
    """Let weights that are zero stay zero from now on, all of them or, after an error, none.

    What is held is plain zero then: a negative one is not kept apart.

    Args:
        kept: by the weight's name, a boolean tensor of its shape as stored, False where it is held at zero.

    Raises:
        InputError: no such weight, a mask of another shape, or a weight that is not zero where it is to stay so.
    """
    parameters = dict(decoder.model.named_parameters(remove_duplicate=False))
    users: dict[int, list[nn.Module]] = {}
    for module in decoder.model.modules():
        users.setdefault(id(getattr(module, "weight", None)), []).append(module)
    for name, mask in kept.items():
        weight = parameters.get(name)
        if weight is None or not name.endswith(".weight"):
            raise InputError(f"a mask for {name!r}, and the model has no such weight")
        if mask.shape != weight.shape:
            raise InputError(f"the mask of {name!r} is {tuple(mask.shape)}; accepted: {tuple(weight.shape)}, its shape")
        if not _holds(weight, mask):
            raise InputError(f"the weight {name!r} is not zero everywhere that its mask says")
    for name, mask in kept.items():
        parameters[name].detach().masked_fill_(~mask, 0)
        mask = beside(parameters[name], mask)
        for module in users[id(parameters[name])]:
            module.register_buffer(MASK, mask, persistent=False)


def held(decoder: Decoder) -> dict[str, Tensor]:
    """Return the masks by the weight's name, one for each distinct weight, as `hold_` takes them.

    A mask whose weight something has written into since, so that it is not zero everywhere, is one no more.
    """
    return {name: mask for name, weight, mask in _masked(decoder) if _holds(weight, mask)}


def _masked(decoder: Decoder) -> Iterator[tuple[str, Tensor, Tensor]]:
    modules = dict(decoder.model.named_modules())
    for name, weight in decoder.model.named_parameters():
        mask = getattr(modules[name.rpartition(".")[0]], MASK, None)
        if mask is not None and name.endswith(".weight") and mask.shape == weight.shape:
            yield name, weight, mask


def _holds(weight: Tensor, mask: Tensor) -> bool:
    return not torch.count_nonzero(weight.detach().masked_fill(mask, 0))


def pack(mask: Tensor) -> Tensor:
    """Return a mask's bits, eight a byte, the last byte filled up with zeros: (bytes,) uint8."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def unpack(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the mask of a shape that `pack` made bits of.

    Raises:
        InputError: the bits are of another shape.
    """
    size = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.shape != (-(-size // 8),):
        raise InputError(f"{bits.numel()} bytes of bits for a mask of shape {shape}; accepted: {-(-size // 8)}")
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=size)).bool().view(shape)
