"""The matrices of a decoder that are one weight for several blocks and a low-rank delta for each: `Factored`.

A checkpoint that loads in plain transformers has them multiplied out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from layerfold.errors import InputError
from layerfold.model.decoder import Decoder
from layerfold.model.factored import Factored

NONE = (
    "the model has none; accepted: a model that shares FFNs, in the compact form "
    "(the dense form has them multiplied out)"
)
"""What to say where low-rank deltas are needed and there are none."""


def factored(decoder: Decoder) -> dict[str, Factored]:
    """Return the matrices that have a delta, by their path, in the order of the blocks."""
    return {path: module for path, module in decoder.model.named_modules() if isinstance(module, Factored)}


def ranks(decoder: Decoder) -> dict[str, int]:
    """Return the rank of each delta, by the path of its matrix."""
    return {path: module.rank for path, module in factored(decoder).items()}


def tensors(decoder: Decoder) -> dict[str, Tensor]:
    """Return all tensors of the matrices that have a delta, by name; the weight that they share only once."""
    found = {
        f"{path}.{name}": parameter.detach()
        for path, module in factored(decoder).items()
        for name, parameter in module.named_parameters()
    }
    own = dict(decoder.model.named_parameters())  # distinct: torch yields a shared parameter once
    return {name: tensor for name, tensor in found.items() if name in own}


def factor_(decoder: Decoder, ranks: Mapping[str, int]) -> None:
    """Give matrices, by their path, a delta of a rank, all of it zero.

    Raises:
        InputError: no matrix has that path, or it admits no delta of that rank.
    """
    matrices = {each.name.removesuffix(".weight"): each.matrix for each in decoder.projections}
    for path, rank in ranks.items():
        if path not in matrices:
            raise InputError(f"a delta for {path!r}, and the model has no such matrix")
        weight, bias = matrices[path].weight, matrices[path].bias
        most = min(weight.shape)
        if type(rank) is not int or not 0 <= rank <= most:
            raise InputError(f"a delta of rank {rank!r} for {path!r}; accepted: 0 ... {most}")
        a, b = weight.new_zeros(len(weight), rank), weight.new_zeros(rank, weight.shape[1])
        stock = type(matrices[path].module)
        decoder.model.set_submodule(path, Factored(weight.clone(), a, b, bias, stock))


def multiplied_out(decoder: Decoder, dtype: torch.dtype | None = None) -> Decoder:
    """Return a decoder that computes the same with plain matrices, each its own; this one where it has no delta.

    Args:
        dtype: of the products; None takes the decoder's own.
    """
    found = factored(decoder)
    if not found:
        return decoder
    plain = decoder.copy(share=True)
    for path, module in found.items():
        plain.model.set_submodule(path, module.multiplied_out(dtype))
    return plain


def shared_alone(decoder: Decoder) -> Decoder:
    """Return a copy with plain matrices of the shared weights, as if no matrix had a delta."""
    plain = decoder.copy()
    for path, module in factored(plain).items():
        plain.model.set_submodule(path, module.without_delta().multiplied_out())
    return plain
