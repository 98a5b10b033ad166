"""Folders that a model is saved to and reloaded from exactly.

Two forms, and no third by tying keys:

- *dense*: what transformers writes, ties between FFNs materialised, low-rank deltas multiplied out (`deltas`) and what
  is gone (`structure`) written as zeros; loads with plain transformers. Masks (`masks`) are in a file of their own, a
  bit a weight, whose suffix is not that of weights: some readers take every ``.safetensors`` file of a folder.
- *compact*: each distinct tensor once, with the names that share it in ``layerfold.json``; of a masked one the bits of
  its mask and the weights that are kept. layerfold rebuilds it exactly. Its weights are not called
  ``model.safetensors``, so that a plain load fails instead of filling what is missing with random values.

Both hold the tokenizer and ``layerfold.json``, which says where the model comes from and what of it is gone or masked.
Weights are saved in the dtype that they came in, unless another is asked for. What was written is read back before it
takes the place of anything (`readback`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from layerfold.checkpoint import compact, portable, readback, structure
from layerfold.checkpoint.structure import MANIFEST
from layerfold.checkpoint.weights import dtype_name, in_dtype
from layerfold.errors import InputError, ModelError, OutputError, first_line, one_of
from layerfold.files import check_hash, hash_file, writing_folder
from layerfold.model import deltas, masks
from layerfold.model.decoder import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Format = Literal["dense", "compact"]
FORMATS: tuple[Format, ...] = ("dense", "compact")
MASKS = "layerfold_masks.bits"
_OLD_MASKS = "layerfold_masks.safetensors"
"""What earlier versions called it."""
DELTAS = "layerfold_deltas.safetensors"
FORMAT_VERSION = 1


def save(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: Path,
    provenance: Mapping[str, Any],
    *,
    format: Format = "dense",
    overwrite: bool = False,
    stored: Stored | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """Write a checkpoint, and read it back; the folder appears whole or not at all.

    Args:
        provenance: JSON that `read_manifest` gives back under ``provenance``.
        overwrite: replace a folder that holds something, and everything in it.
        stored: how the checkpoint that the model comes from holds it; None where that is not known.
        dtype: of the weights in the files; None takes the one that they came in.

    Returns:
        What was written: its form and its dtype.

    Raises:
        InputError: weights that the dtype cannot hold.
        OutputError: the folder holds something and `overwrite` is off, it cannot be written, or what was written reads
            back as something else. Whatever the folder held is still there then.
    """
    check_format(format)
    stored = Stored() if stored is None else stored
    came_in = decoder.model.dtype if stored.dtype is None else stored.dtype
    dtype = came_in if dtype is None else dtype
    with quiet(), writing_folder(directory, overwrite=overwrite) as folder:
        decoder = decoder if format == "compact" else deltas.multiplied_out(decoder)
        manifest: dict[str, Any] = {"format": format, "format_version": FORMAT_VERSION, "provenance": dict(provenance)}
        manifest["dtype"] = {
            "loaded": dtype_name(came_in),
            "computed": dtype_name(decoder.model.dtype),
            "saved": dtype_name(dtype),
        }
        manifest |= structure.describe(decoder)
        if format == "compact":
            manifest |= compact.write(decoder, folder, dtype)
        else:
            state = write_dense(decoder.model, folder, dtype=dtype)
            readback.check_config(folder, decoder.model, state)
            tied = {
                alias: name for alias, name in structure.aliases(decoder.model).items() if _declared(decoder, alias)
            }
            readback.check_tensors(folder.glob("*.safetensors"), state, tied)
            manifest |= _write_masks(decoder, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
            portable.write_tokenizer_config_(folder, stored.tokenizer_class)
            readback.check_tokenizer(folder, tokenizer)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        read_manifest(folder)
    return f"{format}, {dtype_name(dtype)}"


@dataclass(frozen=True)
class Stored:
    """How the checkpoint that a model comes from holds it.

    Attributes:
        dtype: of most of its weights; None where the model comes from no checkpoint, and is saved in its own.
        tokenizer_class: what its ``tokenizer_config.json`` names; None where it names none.
    """

    dtype: torch.dtype | None = None
    tokenizer_class: str | None = None


def check_format(format: str) -> None:
    """Raise InputError for a format that does not exist."""
    if format not in FORMATS:
        raise InputError(f"unknown format {one_of(format, FORMATS)}")


def write_dense(
    model: PreTrainedModel,
    folder: Path,
    state: Mapping[str, Tensor] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Write what plain transformers loads: tensors tied beyond what the architecture declares are copied.

    Args:
        state: the weights, where they are not to be taken from the model, as when it is sharded; not with deltas.
        dtype: of the weights in the files; None takes the model's own.

    Returns:
        The weights as written, by name.
    """
    if deltas.ranks(decoder := Decoder(model)):
        model, state = deltas.multiplied_out(decoder).model, None
    whole = structure.filled(model, model.state_dict() if state is None else state)
    aliases, dtype = structure.aliases(model), model.dtype if dtype is None else dtype
    written = {name: in_dtype(name, tensor, dtype) for name, tensor in whole.items() if name not in aliases}
    for alias, name in aliases.items():
        # Where the architecture does not declare that the two are one, a plain reader looks for both.
        if alias in whole:
            written[alias] = written[name] if _declared(decoder, alias) else written[name].clone()
    model.save_pretrained(folder, state_dict=dict(written))
    portable.write_config_(folder, dtype_name(dtype))
    return written


def _declared(decoder: Decoder, alias: str) -> bool:
    """Whether the architecture itself says that a parameter is tied to another."""
    return alias in decoder.model.all_tied_weights_keys


def write_training(model: PreTrainedModel, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write what plain transformers loads, and the deltas that are multiplied out in it: `read_training_`."""
    write_dense(model, folder, state)
    if factors := deltas.tensors(Decoder(model)):
        save_file(factors, folder / DELTAS)


def read_training_(model: PreTrainedModel, folder: Path) -> None:
    """Overwrite a model's weights by those that `write_training` wrote for one of the same structure.

    Raises:
        ModelError: they are missing, damaged, of another structure, or not zero where the model's masks say.
    """
    decoder = Decoder(model)
    kept = masks.held(decoder)
    try:
        state = {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}
        state = structure.stripped(decoder, state, folder)
        if ranks := deltas.ranks(decoder):
            plain = {f"{path}.weight" for path in ranks}  # multiplied out
            state = {name: tensor for name, tensor in state.items() if name not in plain} | load_file(folder / DELTAS)
        found = model.load_state_dict(state, strict=False)
        masks.hold_(decoder, kept)
    except (InputError, SafetensorError, OSError, RuntimeError) as error:
        raise ModelError(f"the weights in {str(folder)!r} cannot be read: {first_line(error)}") from error
    missing = set(found.missing_keys) - set(structure.aliases(model))
    if missing or found.unexpected_keys:
        told = f"missing {sorted(missing)[:3]}, unexpected {sorted(found.unexpected_keys)[:3]}"
        raise ModelError(f"the weights in {str(folder)!r} are of another model: {told}")


def restore_(decoder: Decoder, manifest: Mapping[str, Any], folder: Path) -> None:
    """Give a decoder that was loaded from a dense checkpoint the structure and the masks that its manifest describes.

    Raises:
        ModelError: they do not fit the weights, or are damaged.
    """
    if manifest.get("ranks"):
        raise structure.damaged(folder, "low-rank deltas in a dense checkpoint, which has none")
    state = decoder.model.state_dict()
    structure.restore_(decoder, manifest, folder)
    structure.stripped(decoder, state, folder)
    shapes = structure.shapes_of(manifest, folder)
    if not shapes:
        return
    file = folder / MASKS if (folder / MASKS).exists() else folder / _OLD_MASKS
    try:
        check_hash(hash_file(file), manifest.get("masks_sha256"), file)
        bits = load_file(file)
        masks.hold_(decoder, {name: masks.unpack(bits[name], tuple(shape)) for name, shape in shapes.items()})
    except (InputError, SafetensorError, OSError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(f"the masks in {str(folder)!r} do not fit: {first_line(error)}") from error


def _write_masks(decoder: Decoder, folder: Path) -> dict[str, Any]:
    kept = masks.held(decoder)
    if not kept:
        return {}
    packed = {name: masks.pack(mask) for name, mask in kept.items()}
    save_file(packed, folder / MASKS)
    readback.check_tensors([folder / MASKS], packed)
    shapes = {name: list(mask.shape) for name, mask in kept.items()}
    return {"masks": shapes, "masks_sha256": hash_file(folder / MASKS)}


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
        raise structure.damaged(directory, repr(error)) from error
    if format_ not in FORMATS or format_version != FORMAT_VERSION or not isinstance(provenance, dict):
        raise ModelError(
            f"{str(path)!r} is of format {format_!r} version {format_version!r}; accepted: version {FORMAT_VERSION}"
        )
    return dict(manifest)


def hash_weights(model: PreTrainedModel) -> str:
    """SHA-256 over all that a model computes with, whatever files it came from.

    That is names, types, shapes and values of all tensors, which of them are tied, and the configuration; and what
    training it would keep: its masks. Half-precision numbers count as the float32 ones that they are equal to.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in readback.OF_THE_FILES}
    known = {"aliases": structure.aliases(model), "config": config}
    digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(memoryview(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy()))
    for name, mask in masks.held(Decoder(model)).items():
        digest.update(f"{name}#mask;".encode())
        digest.update(masks.pack(mask).numpy().tobytes())
    return digest.hexdigest()


def bytes_on_disk(decoder: Decoder, format: Format, dtype: torch.dtype | None = None) -> int:
    """Write the weights to a temporary folder, in this dtype or the model's own; return the size of their files."""
    try:
        with quiet(), tempfile.TemporaryDirectory(prefix="layerfold-") as name:
            folder = Path(name)
            if format == "compact":
                compact.write(decoder, folder, dtype)
            else:
                write_dense(decoder.model, folder, dtype=dtype)
            return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write to the temporary folder: {first_line(error)}") from error


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
