"""What a configuration cannot say of a decoder's structure: sublayers gone, FFNs of different widths, low-rank deltas.

A dense checkpoint holds zeros in the place of what is gone, which compute the same, and deltas multiplied out; a
manifest says what the zeros stand for. A compact one holds what there is.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerfold import deltas
from layerfold.decoder import Decoder
from layerfold.errors import InputError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MANIFEST = "layerfold.json"


def describe(decoder: Decoder) -> dict[str, Any]:
    """Return a manifest's entries: the parts that are gone, the FFNs narrower than the widest, the deltas' ranks."""
    widths = dict(enumerate(decoder.d_ffn))
    narrow = {str(index): width for index, width in widths.items() if 0 < width < max(widths.values())}
    return {"removed": decoder.removed_parts, "d_ffn": narrow, "ranks": deltas.ranks(decoder)}


def restore_(decoder: Decoder, manifest: Mapping[str, Any], folder: Path) -> None:
    """Give a decoder that is as its configuration says the structure that a manifest describes.

    Raises:
        ModelError: the manifest describes none that it can have.
    """
    try:
        for part, indices in manifest.get("removed", {}).items():
            decoder.remove_(part, indices)
        narrow = {int(index): width for index, width in manifest.get("d_ffn", {}).items()}
        have = dict(enumerate(decoder.d_ffn))
        whole = have.keys() - narrow.keys() - set(decoder.removed_parts["ffn"])
        if narrow and not (whole and all(_cuts(width, have.get(index, 0)) for index, width in narrow.items())):
            raise InputError(
                f"d_ffn {narrow}; accepted: blocks, not all, each with a number below {max(have.values())}"
            )
        decoder.keep_neurons_({index: torch.arange(width) for index, width in narrow.items()})
        deltas.factor_(decoder, manifest.get("ranks", {}))
    except (InputError, AttributeError, TypeError, ValueError) as error:
        raise ModelError(f"{str(folder / MANIFEST)!r} is damaged: {error}") from error


def _cuts(width: object, of: int) -> bool:
    return type(width) is int and 0 < width < of


def filled(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with zeros for all that the model lacks of what its configuration says."""
    found = dict(state)
    for name, shape in _lacking(Decoder(model)).items():
        whole = torch.zeros(shape, dtype=model.dtype)
        if name in found:
            whole[_corner(found[name])] = found[name]
        found[name] = whole
    return found


def stripped(decoder: Decoder, state: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Return what `filled` was given.

    Raises:
        ModelError: there are no zeros where it put them.
    """
    found = dict(state)
    own = decoder.model.state_dict()
    for name, shape in _lacking(decoder).items():
        whole = found.pop(name, torch.zeros(0))
        if whole.shape != shape:
            raise ModelError(f"the weights in {str(folder)!r}: {name!r} is {tuple(whole.shape)}, not {tuple(shape)}")
        inside = _corner(own[name]) if name in own else None
        if torch.count_nonzero(whole) != (0 if inside is None else torch.count_nonzero(whole[inside])):
            raise ModelError(f"the weights in {str(folder)!r}: {name!r} is not zero where the model has nothing")
        if inside is not None:
            found[name] = whole[inside]
    return found


def _lacking(decoder: Decoder) -> dict[str, torch.Size]:
    """The whole shapes of the tensors that a decoder has not, or not whole."""
    if len(set(decoder.d_ffn)) == 1 and not decoder.removed_prefixes:
        return {}
    model = decoder.model
    with torch.device("meta"):  # for the shapes alone
        whole = type(model)(copy.deepcopy(model.config)).state_dict()
    own = model.state_dict()
    shared = {f"{path}.weight" for path in deltas.ranks(decoder)}
    return {
        name: each.shape
        for name, each in whole.items()
        if name not in own or (own[name].shape != each.shape and name not in shared)
    }


def _corner(tensor: Tensor) -> tuple[slice, ...]:
    """Where a tensor stands in the larger one: what is cut off is at the ends."""
    return tuple(slice(size) for size in tensor.shape)


def aliases(model: PreTrainedModel) -> dict[str, str]:
    """For each parameter name that shares its tensor with an earlier one: that earlier name."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            aliases[name] = known
    return aliases
