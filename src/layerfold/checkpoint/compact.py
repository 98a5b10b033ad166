"""The compact form of a checkpoint: each distinct tensor once, a masked one as its mask's bits and other weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from layerfold.checkpoint import portable, readback, structure
from layerfold.checkpoint.weights import dtype_name, in_dtype
from layerfold.errors import InputError, ModelError
from layerfold.files import check_hash, hash_file
from layerfold.memory.mapped import beside
from layerfold.model import masks
from layerfold.model.decoder import Decoder
from layerfold.model.inferring import view

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

COMPACT_WEIGHTS = "layerfold.safetensors"
MODEL_TYPE = "layerfold"
"""The configuration's model type in this form, so that nothing loads it as a plain model."""
_BITS = "#mask"


def write(decoder: Decoder, folder: Path, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Write weights and configuration, and read them back; return the manifest's entries for them.

    Args:
        dtype: dtype of the weights in the file; None takes the model's own.

    Raises:
        InputError: a model whose code comes from its checkpoint.
        OutputError: a file reads back with other contents.
    """
    model = decoder.model
    if readback.is_remote(model):
        raise InputError(
            f"the compact form of a {type(model).__name__}, which cannot hold the code of the model's checkpoint; "
            "accepted: the dense form"
        )
    dtype = model.dtype if dtype is None else dtype
    model.config.architectures = [type(model).__name__]
    document = json.loads(model.config.to_json_string()) | {"dtype": dtype_name(dtype)}
    portable.write(folder / portable.CONFIG, {"model_type": MODEL_TYPE, "decoder": document})
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    aliases = structure.aliases(model)
    kept = masks.held(decoder)
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in aliases}
    stored = {name: in_dtype(name, tensor, dtype).contiguous() for name, tensor in own.items()}
    for name, mask in kept.items():
        stored |= {name: beside(stored[name], stored[name][mask]), name + _BITS: masks.pack(mask)}
    save_file(stored, folder / COMPACT_WEIGHTS, metadata={"format": "pt"})
    readback.check_tensors([folder / COMPACT_WEIGHTS], stored)
    readback.compare_configs(read_config(folder), model.config)
    shapes = {name: list(mask.shape) for name, mask in kept.items()}
    return {"aliases": aliases, "masks": shapes, "sha256": _hash(folder / COMPACT_WEIGHTS, aliases)}


def read_config(directory: Path) -> PreTrainedConfig:
    """Return the configuration of the decoder in a compact form.

    Raises:
        OSError, ValueError, TypeError, KeyError: it is missing or damaged.
    """
    from transformers import CONFIG_MAPPING

    document = portable.read(directory / portable.CONFIG)
    document = document["decoder"] if document["model_type"] == MODEL_TYPE else document  # earlier versions
    config: PreTrainedConfig = CONFIG_MAPPING[document["model_type"]].from_dict(document)
    return config


def _unpacked(stored: Mapping[str, Tensor], shapes: Mapping[str, list[int]]) -> tuple[dict[str, Tensor], ...]:
    """The whole weights, and the masks."""
    kept = {name: masks.unpack(stored[name + _BITS], tuple(shape)) for name, shape in shapes.items()}
    tensors = {name: tensor for name, tensor in stored.items() if not name.endswith(_BITS)}
    for name, mask in kept.items():
        tensors[name] = torch.zeros(mask.shape, dtype=tensors[name].dtype).masked_scatter_(mask, tensors[name])
    return tensors, kept


def load(directory: Path, manifest: Mapping[str, Any]) -> PreTrainedModel:
    """Rebuild a model from its compact form, with its ties.

    Raises:
        ModelError: missing or damaged weights, or a structure that does not fit them.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    weights = directory / COMPACT_WEIGHTS
    aliases = manifest.get("aliases")
    if not weights.is_file() or not isinstance(aliases, dict):
        raise ModelError(f"the compact checkpoint {str(directory)!r} lacks its weights or its structure")
    check_hash(_hash(weights, aliases), manifest.get("sha256"), weights)
    shapes = structure.shapes_of(manifest, directory)
    with structure.reading(f"the compact checkpoint {str(directory)!r} cannot be read"):
        tensors, kept = _unpacked(load_file(weights), shapes)
        config = read_config(directory)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
        decoder = view(model)
        structure.restore_(decoder, manifest, directory)
        state = tensors | {alias: tensors[name] for alias, name in aliases.items()}
        model.load_state_dict(state, strict=True, assign=True)
        if (directory / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(directory)
        for alias, name in aliases.items():
            path, _, attribute = alias.rpartition(".")
            setattr(model.get_submodule(path), attribute, model.get_parameter(name))
        masks.hold_(decoder, kept)
    model.eval()
    return model


def _hash(weights: Path, aliases: Mapping[str, str]) -> str:
    """SHA-256 over the stored tensors and the names that share them."""
    return hash_file(weights, json.dumps(aliases, sort_keys=True))
