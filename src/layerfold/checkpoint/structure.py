"""What a configuration cannot say of a structure: sublayers gone, FFNs of different widths, heads gone, deltas.

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

from layerfold.errors import InputError, ModelError
from layerfold.model import deltas
from layerfold.model.block import FUSED
from layerfold.model.decoder import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


MANIFEST = "layerfold.json"


def damaged(folder: Path, why: object) -> ModelError:
    """Return the error of a folder whose manifest is not what layerfold writes."""
    return ModelError(f"{str(folder / MANIFEST)!r} is damaged: {why}")


def describe(decoder: Decoder) -> dict[str, Any]:
    """Return a manifest's entries.

    The parts that are gone, the FFNs narrower than the widest, the attentions of fewer heads, the deltas' ranks.
    """
    widths = dict(enumerate(decoder.d_ffn))
    narrow = {str(index): width for index, width in widths.items() if 0 < width < max(widths.values())}
    fewer = {str(index): heads for index, heads in _fewer_heads(decoder).items()}
    return {"removed": decoder.removed_parts, "d_ffn": narrow, "heads": fewer, "ranks": deltas.ranks(decoder)}


def _fewer_heads(decoder: Decoder) -> dict[int, int]:
    """The groups of heads of those attentions that have fewer than the configuration says."""
    config = decoder.model.config
    whole = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    return {index: heads for index, heads in enumerate(decoder.heads) if 0 < heads < whole}


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
        heads = {int(index): number for index, number in manifest.get("heads", {}).items()}
        for index, number in heads.items():
            if not _cuts(number, dict(enumerate(decoder.heads)).get(index, 0)):
                raise InputError(f"heads {heads}; accepted: blocks, each with a number below {max(decoder.heads)}")
        decoder.keep_heads_({index: torch.arange(number) for index, number in heads.items()})
        deltas.factor_(decoder, manifest.get("ranks", {}))
    except (InputError, AttributeError, TypeError, ValueError) as error:
        raise damaged(folder, error) from error


def _cuts(width: object, of: int) -> bool:
    return type(width) is int and 0 < width < of


def filled(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with zeros for all that the model lacks of what its configuration says."""
    found, decoder = dict(state), Decoder(model)
    for name, shape in _lacking(decoder).items():
        whole = torch.zeros(shape, dtype=model.dtype)
        if name in found:
            inside = _inside(decoder, name, whole, found[name].shape)
            inside.copy_(found[name].view(inside.shape))
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
        inside = _inside(decoder, name, whole, own[name].shape) if name in own else whole.new_zeros(0)
        if torch.count_nonzero(whole) != torch.count_nonzero(inside):
            raise ModelError(f"the weights in {str(folder)!r}: {name!r} is not zero where the model has nothing")
        if name in own:
            found[name] = inside.reshape(own[name].shape)
    return found


def _lacking(decoder: Decoder) -> dict[str, torch.Size]:
    """The whole shapes of the tensors that a decoder has not, or not whole."""
    if len(set(decoder.d_ffn)) == 1 and not decoder.removed_prefixes and not _fewer_heads(decoder):
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


def _inside(decoder: Decoder, name: str, whole: Tensor, shape: torch.Size) -> Tensor:
    """Return a view of the part of a tensor that a smaller one stands for; what is cut off is at the ends.

    Of queries, keys and values that are one matrix, it is at the end of each: the view has one dimension more.
    """
    family = decoder.family
    fused = len(family.attention_inputs) == 1 and f".{family.attention}.{family.attention_inputs[0]}." in name
    parts = FUSED if fused else 1
    apart: Tensor = whole.unflatten(-1, (parts, -1))
    return apart[tuple(slice(size) for size in (*shape[:-1], parts, shape[-1] // parts))]


def aliases(model: PreTrainedModel) -> dict[str, str]:
    """For each parameter name that shares its tensor with an earlier one: that earlier name."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            aliases[name] = known
    return aliases


def shapes_of(manifest: Mapping[str, Any], folder: Path) -> dict[str, list[int]]:
    """Return a manifest's masks, their shapes by the weight's name.

    Raises:
        ModelError: it holds something else in their place.
    """
    shapes = manifest.get("masks", {})
    if not isinstance(shapes, dict):
        raise damaged(folder, f"the masks are {str(shapes)[:60]!r}, not by name")
    return shapes
