"""Folders that a model is saved to and reloaded from exactly.

Two forms, and no third by tying keys:

- *dense*: what transformers writes, ties between FFNs materialised and removed sublayers written as zeros; loads with
  plain transformers.
- *compact*: each distinct tensor once, with the names that share it in ``layerfold.json``; layerfold rebuilds it
  exactly. Its weights are not called ``model.safetensors``, so that a plain load fails instead of filling what is
  missing with random values.

Both hold the tokenizer and ``layerfold.json``, which says where the model comes from and which sublayers are gone.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from layerfold.decoder import Decoder
from layerfold.errors import InputError, ModelError, OutputError, one_of
from layerfold.folders import writing_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Format = Literal["dense", "compact"]
FORMATS: tuple[Format, ...] = ("dense", "compact")
MANIFEST = "layerfold.json"
COMPACT_WEIGHTS = "layerfold.safetensors"
FORMAT_VERSION = 1
_OF_THE_FILES = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"}


def save(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: Path,
    provenance: Mapping[str, Any],
    *,
    format: Format = "dense",
    overwrite: bool = False,
) -> None:
    """Write a checkpoint; the folder appears whole or not at all.

    Args:
        provenance: JSON that `read_manifest` gives back under ``provenance``.
        overwrite: replace a folder that holds something, and everything in it.

    Raises:
        OutputError: the folder holds something and `overwrite` is off, or it cannot be written.
    """
    check_format(format)
    with quiet(), writing_folder(directory, overwrite=overwrite) as folder:
        manifest: dict[str, Any] = {"format": format, "format_version": FORMAT_VERSION, "provenance": dict(provenance)}
        manifest["removed"] = decoder.removed_parts
        if format == "compact":
            manifest |= _write_compact(decoder.model, folder)
        else:
            write_dense(decoder.model, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def check_format(format: str) -> None:
    """Raise InputError for a format that does not exist."""
    if format not in FORMATS:
        raise InputError(f"unknown format {one_of(format, FORMATS)}")


def write_dense(model: PreTrainedModel, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write what plain transformers loads: tensors tied beyond what the architecture declares are copied.

    Zeros stand for what was removed: they compute the same.

    Args:
        state: the weights, where they are not to be taken from the model, as when it is sharded.
    """
    state = dict(model.state_dict() if state is None else state)
    state |= _zeros(model)
    declared = {alias for alias in _aliases(model) if alias in model.all_tied_weights_keys}
    for alias in _aliases(model):
        if alias not in declared:
            state[alias] = state[alias].clone()
    model.save_pretrained(folder, state_dict=state)


def _zeros(model: PreTrainedModel) -> dict[str, Tensor]:
    """Zeros for every tensor of the removed sublayers."""
    prefixes = Decoder(model).removed_prefixes
    if not prefixes:
        return {}
    with torch.device("meta"):  # for the shapes alone
        whole = type(model)(copy.deepcopy(model.config)).state_dict()
    return {name: torch.zeros(t.shape, dtype=model.dtype) for name, t in whole.items() if name.startswith(prefixes)}


def _check_zeros(state: Mapping[str, Tensor], prefixes: tuple[str, ...], folder: Path) -> None:
    for name, tensor in state.items():
        if name.startswith(prefixes) and tensor.any():
            raise ModelError(f"the weights in {str(folder)!r}: {name!r} is of a removed sublayer, and not zero")


def read_dense_(model: PreTrainedModel, folder: Path) -> None:
    """Overwrite a model's weights by those that `write_dense` wrote for one of the same structure.

    Raises:
        ModelError: they are missing, damaged, or of another structure.
    """
    try:
        state = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        removed = Decoder(model).removed_prefixes
        _check_zeros(state, removed, folder)
        kept = {name: tensor for name, tensor in state.items() if not name.startswith(removed)}
        found = model.load_state_dict(kept, strict=False)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ModelError(f"the weights in {str(folder)!r} cannot be read: {_first_line(error)}") from error
    missing = set(found.missing_keys) - set(_aliases(model))
    if missing or found.unexpected_keys:
        told = f"missing {sorted(missing)[:3]}, unexpected {sorted(found.unexpected_keys)[:3]}"
        raise ModelError(f"the weights in {str(folder)!r} are of another model: {told}")


def remove_parts_(decoder: Decoder, manifest: Mapping[str, Any], folder: Path) -> None:
    """Remove the sublayers that a manifest says are gone, from a decoder whose dense form holds zeros there.

    Raises:
        ModelError: the manifest names what cannot be removed, or there are no zeros.
    """
    state = decoder.model.state_dict()
    _remove_(decoder, manifest, folder)
    _check_zeros(state, decoder.removed_prefixes, folder)


def _remove_(decoder: Decoder, manifest: Mapping[str, Any], folder: Path) -> None:
    try:
        for part, indices in manifest.get("removed", {}).items():
            decoder.remove_(part, indices)
    except (InputError, AttributeError, TypeError) as error:
        raise ModelError(f"{str(folder / MANIFEST)!r} is damaged: removed: {error}") from error


def _write_compact(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    aliases = _aliases(model)
    stored = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in aliases}
    save_file(stored, folder / COMPACT_WEIGHTS, metadata={"format": "pt"})
    return {"aliases": aliases, "sha256": _hash_compact(folder / COMPACT_WEIGHTS, aliases)}


def _aliases(model: PreTrainedModel) -> dict[str, str]:
    """For each parameter name that shares its tensor with an earlier one: that earlier name."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            aliases[name] = known
    return aliases


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """Return what ``layerfold.json`` says, or None where there is none.

    Raises:
        ModelError: it is not what layerfold writes.
    """
    path = directory / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        format_, format_version, provenance = (manifest[k] for k in ("format", "format_version", "provenance"))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{str(path)!r} is damaged: {error!r}") from error
    if format_ not in FORMATS or format_version != FORMAT_VERSION or not isinstance(provenance, dict):
        raise ModelError(
            f"{str(path)!r} is of format {format_!r} version {format_version!r}; accepted: version {FORMAT_VERSION}"
        )
    return dict(manifest)


def load_compact(directory: Path, manifest: Mapping[str, Any]) -> PreTrainedModel:
    """Rebuild a model from its compact form, with what was tied tied.

    Raises:
        ModelError: missing or damaged weights, or a structure that does not fit them.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    weights = directory / COMPACT_WEIGHTS
    aliases = manifest.get("aliases")
    if not weights.is_file() or not isinstance(aliases, dict):
        raise ModelError(f"the compact checkpoint {str(directory)!r} lacks its weights or its structure")
    found = _hash_compact(weights, aliases)
    if found != manifest.get("sha256"):
        raise ModelError(
            f"{str(weights)!r} is damaged: SHA-256 {found[:12]}..., recorded {str(manifest.get('sha256'))[:12]}..."
        )
    try:
        tensors = load_file(weights)
        config = AutoConfig.from_pretrained(directory)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
        _remove_(Decoder(model), manifest, directory)
        state = tensors | {alias: tensors[name] for alias, name in aliases.items()}
        model.load_state_dict(state, strict=True, assign=True)
        if (directory / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(directory)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"the compact checkpoint {str(directory)!r} cannot be read: {_first_line(error)}") from error
    for alias, name in aliases.items():
        _tie(model, alias, name)
    model.eval()
    return model


def _tie(model: PreTrainedModel, alias: str, name: str) -> None:
    path, _, attribute = alias.rpartition(".")
    setattr(model.get_submodule(path), attribute, model.get_parameter(name))


def hash_weights(model: PreTrainedModel) -> str:
    """SHA-256 over all that a model computes with, whatever files it came from.

    That is names, types, shapes and values of all tensors, which of them are tied, and the configuration.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in _OF_THE_FILES}
    structure = {"aliases": _aliases(model), "config": config}
    digest = hashlib.sha256(json.dumps(structure, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def _hash_compact(weights: Path, aliases: Mapping[str, str]) -> str:
    """SHA-256 over the stored tensors and which names share them."""
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(json.dumps(aliases, sort_keys=True).encode())
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def bytes_on_disk(decoder: Decoder, format: Format) -> int:
    """Write the weights to a temporary folder and return the size of their files."""
    try:
        with quiet(), tempfile.TemporaryDirectory(prefix="layerfold-") as name:
            folder = Path(name)
            if format == "compact":
                _write_compact(decoder.model, folder)
            else:
                write_dense(decoder.model, folder)
            return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write to the temporary folder: {_first_line(error)}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from drawing its own bars and warnings over ours; what matters is checked and raised."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
