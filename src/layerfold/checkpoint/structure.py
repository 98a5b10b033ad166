"""Structures that a configuration cannot describe: removed sublayers, narrower FFNs, fewer heads, low-rank deltas.

A dense checkpoint holds zeros in place of the removed weights, which compute the same, and deltas multiplied out; its
manifest names the removed parts. A compact one holds the remaining weights only.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor

from layerfold.errors import InputError, ModelError, first_line
from layerfold.memory.mapped import beside
from layerfold.model import deltas
from layerfold.model.block import rows_of
from layerfold.model.decoder import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


MANIFEST = "layerfold.json"


def damaged(folder: Path, why: object) -> ModelError:
    """Return the error of a folder with a damaged manifest."""
    return ModelError(f"{str(folder / MANIFEST)!r} is damaged: {why}")


@contextlib.contextmanager
def reading(refusal: str) -> Iterator[None]:
    """Raise ModelError, the refusal and the error's first line, for the errors of libraries in damaged files."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(f"{refusal}: {first_line(error)[:300]}") from error


def describe(decoder: Decoder) -> dict[str, Any]:
    """Return a manifest's entries: removed parts, narrower FFNs, attentions with fewer heads, the deltas' ranks."""
    widths = dict(enumerate(decoder.d_ffn))
    narrow = {str(index): width for index, width in widths.items() if 0 < width < decoder.configured.d_ffn}
    fewer = {str(index): heads for index, heads in _fewer_heads(decoder).items()}
    return {"removed": decoder.removed_parts, "d_ffn": narrow, "heads": fewer, "ranks": deltas.ranks(decoder)}


def _fewer_heads(decoder: Decoder) -> dict[int, int]:
    """Number of key-value heads of the attentions that have fewer than the configuration says."""
    whole = decoder.configured_heads
    return {index: heads for index, heads in enumerate(decoder.heads) if 0 < heads < whole}


def restore_(decoder: Decoder, manifest: Mapping[str, Any], folder: Path) -> None:
    """Give a decoder of its configuration's structure the structure that a manifest describes.

    Raises:
        ModelError: the manifest does not fit the decoder.
    """
    try:
        for part, indices in manifest.get("removed", {}).items():
            decoder.remove_(part, indices)
        narrow = {int(index): width for index, width in manifest.get("d_ffn", {}).items()}
        widths = dict(enumerate(decoder.d_ffn))
        whole = widths.keys() - narrow.keys() - set(decoder.removed_parts["ffn"])
        told = bool(decoder.family.d_ffn)  # the configuration's number is that of the widest block
        cut = all(_cuts(width, widths.get(index, 0)) for index, width in narrow.items())
        if narrow and not (cut and (whole or not told)):
            not_all = ", not all" if told else ""
            raise InputError(
                f"d_ffn {narrow}; accepted: blocks{not_all}, each with a number below {max(decoder.d_ffn)}"
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
    """Return a state dict of the configuration's shapes, with zeros for the weights that the model lacks."""
    filled, decoder = dict(state), Decoder(model)
    places = _places(decoder)
    for name, shape in lacking(decoder).items():
        whole = torch.zeros(shape, dtype=model.dtype)
        if name in filled:
            whole[_inside(decoder, places, name, shape)] = filled[name].to(whole.dtype)
        filled[name] = beside(state.get(name, cast(Tensor, model.get_input_embeddings().weight)), whole)
    return filled


def stripped(decoder: Decoder, state: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Return the state dict that `filled` was given.

    Raises:
        ModelError: a weight that the model lacks is not zero.
    """
    stripped = dict(state)
    own, places = decoder.model.state_dict(), _places(decoder)
    for name, shape in lacking(decoder).items():
        whole = stripped.pop(name, torch.zeros(0))
        if whole.shape != shape:
            raise ModelError(f"the weights in {str(folder)!r}: {name!r} is {tuple(whole.shape)}, not {tuple(shape)}")
        inside = whole[_inside(decoder, places, name, shape)] if name in own else whole.new_zeros(0)
        if torch.count_nonzero(whole) != torch.count_nonzero(inside):
            raise ModelError(f"the weights in {str(folder)!r}: {name!r} is not zero where the model has nothing")
        if name in own:
            stripped[name] = inside
    return stripped


def lacking(decoder: Decoder) -> dict[str, torch.Size]:
    """Shapes, by the configuration, of the tensors that a decoder lacks in whole or in part."""
    if set(decoder.d_ffn) == {decoder.configured.d_ffn} and not decoder.removed_prefixes and not _fewer_heads(decoder):
        return {}
    whole, own = outline(decoder.model).state_dict(), decoder.model.state_dict()
    shared = {f"{path}.weight" for path in deltas.ranks(decoder)}
    return {
        name: tensor.shape
        for name, tensor in whole.items()
        if name not in own or (own[name].shape != tensor.shape and name not in shared)
    }


def outline(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the same configuration that has shapes and no weights."""
    config = copy.deepcopy(model.config)
    config.dtype = model.dtype  # which may be a name in a configuration that was read from a file
    with torch.device("meta"):
        return type(model)(config)


_Places = dict[str, tuple[Tensor | None, Tensor | None]]
"""By a matrix's path: which outputs and which inputs of the configuration's matrix it has; None for all of them."""


def _places(decoder: Decoder) -> _Places:
    """Return where smaller matrices lie in those of the configuration: first neurons and groups of heads come first."""
    family, whole, heads = decoder.family, decoder.configured.d_ffn, decoder.configured_heads
    found: _Places = {}
    for block in decoder.blocks:
        at = f"{family.blocks}.{block.index}."
        if 0 < block.d_ffn < whole:
            ffn, neurons = f"{at}{family.ffn}." if family.ffn else at, torch.arange(block.d_ffn)
            both = torch.cat([neurons, neurons + whole]) if family.fused_gate else neurons
            found |= {f"{ffn}{name}": (both, None) for name in (family.up, family.gate) if name}
            found[f"{ffn}{family.down}"] = None, neurons
        if 0 < block.heads < heads:
            attention, groups = block.attention, torch.arange(block.heads)
            for place, name in enumerate(family.attention_inputs):
                runs = rows_of(groups, heads, widths := attention.widths(place)).split(widths, dim=1)
                found[f"{at}{family.attention}.{name}"] = torch.cat([run.flatten() for run in runs]), None
            read = rows_of(groups, heads, [attention.channels]).flatten()
            found[f"{at}{family.attention}.{family.attention_output}"] = None, read
    return found


def _inside(decoder: Decoder, places: _Places, name: str, shape: torch.Size) -> tuple[Tensor, ...]:
    """Return the index of the part of a tensor of the configuration's shape that a smaller one fills."""
    path, _, kind = name.rpartition(".")
    outputs, inputs = places.get(path, (None, None))
    turned = type(decoder.model.get_submodule(path)).__name__ == "Conv1D"
    own = [outputs] if kind == "bias" else [inputs, outputs] if turned else [outputs, inputs]
    there = [torch.arange(size) if each is None else each for each, size in zip(own, shape, strict=True)]
    return (there[0],) if len(there) == 1 else (there[0][:, None], there[1])


def aliases(model: PreTrainedModel) -> dict[str, str]:
    """Return, for each parameter name that shares its tensor with an earlier one, that earlier name."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            aliases[name] = known
    return aliases


def shapes_of(manifest: Mapping[str, Any], folder: Path) -> dict[str, list[int]]:
    """Return the shapes of a manifest's masks, by the weight's name.

    Raises:
        ModelError: the entry is something else.
    """
    shapes = manifest.get("masks", {})
    if not isinstance(shapes, dict):
        raise damaged(folder, f"the masks are {str(shapes)[:60]!r}, not a mapping by name")
    return shapes
