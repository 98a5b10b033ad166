"""Checkpoints: folders from which a saved model loads exactly.

Two forms, and no third by tying keys:

- *dense*: the files of transformers, with tied FFNs copied, low-rank deltas multiplied out (`deltas`) and zeros in
  place of removed weights (`structure`); plain transformers loads it. Masks (`masks`) are in a file of their own, a bit
  per weight, without the suffix of weights: some readers take every ``.safetensors`` file of a folder.
- *compact*: each distinct tensor once, with the names that share it in ``layerfold.json``; a masked one as its mask's
  bits and its other weights. layerfold rebuilds the model exactly. The weights' file is not ``model.safetensors``, so
  that a plain load fails instead of filling missing weights with random values.

Both hold the tokenizer and ``layerfold.json``: the model's provenance, its structure and its masks. Weights keep the
dtype of the checkpoint that they came from, unless another is asked for. All files are read back before they replace
anything (`readback`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from layerfold.checkpoint import compact, portable, readback, structure
from layerfold.checkpoint.structure import MANIFEST
from layerfold.checkpoint.weights import dtype_name, in_dtype
from layerfold.errors import ModelError, OutputError, check_one_of, first_line
from layerfold.files import check_hash, hash_file
from layerfold.memory.mapped import cloned
from layerfold.model import deltas, masks
from layerfold.model.decoder import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Format = Literal["dense", "compact"]
FORMATS: tuple[Format, ...] = get_args(Format)
MASKS = "layerfold_masks.bits"
_OLD_MASKS = "layerfold_masks.safetensors"
"""Name of the file in earlier versions."""
DELTAS = "layerfold_deltas.safetensors"
FORMAT_VERSION = 1
_PIECE = 1 << 22
"""How many numbers are hashed at a time."""


def write(decoder: Decoder, folder: Path, format: Format, dtype: torch.dtype) -> dict[str, Any]:
    """Write weights, configuration and masks, and read them back; return the manifest's entries for them.

    Raises:
        InputError: an unknown format, or weights that the dtype cannot hold.
        OutputError: a file reads back with other contents.
    """
    check_one_of("unknown format", format, FORMATS)
    if format == "compact":
        return structure.describe(decoder) | compact.write(decoder, folder, dtype)
    # In the wider dtype: products are rounded once.
    decoder = deltas.multiplied_out(decoder, torch.promote_types(decoder.dtype, dtype or decoder.dtype))
    state = write_dense(decoder.model, folder, dtype=dtype)
    readback.check_config(folder, decoder.model, state)
    aliases = structure.aliases(decoder.model).items()
    tied = {alias: name for alias, name in aliases if alias in state and _declared(decoder, alias)}
    readback.check_tensors(folder.glob("*.safetensors"), *readback.as_published(decoder.model, state, tied))
    return structure.describe(decoder) | _write_masks(decoder, folder)


def write_dense(
    model: PreTrainedModel,
    folder: Path,
    state: Mapping[str, Tensor] | None = None,
    *,
    dtype: torch.dtype | None = None,
    published: bool = True,
) -> dict[str, Tensor]:
    """Write the files that plain transformers loads, with ties that the architecture does not declare as copies.

    Args:
        state: weights to write instead of the model's own, as for a sharded model; not with deltas.
        dtype: dtype of the weights in the files; None takes the model's own.
        published: write tensors by the names that checkpoints of the architecture have, where the model's differ.

    Returns:
        The written weights, by the model's names.
    """
    if deltas.ranks(decoder := Decoder(model)):
        model, state = deltas.multiplied_out(decoder).model, None
    whole = structure.filled(model, model.state_dict() if state is None else state)
    aliases, dtype = structure.aliases(model), model.dtype if dtype is None else dtype
    written = {name: in_dtype(name, tensor, dtype) for name, tensor in whole.items() if name not in aliases}
    for alias, name in aliases.items():
        # A plain reader looks for both tensors of a tie that the architecture does not declare.
        if alias in whole:
            written[alias] = written[name] if _declared(decoder, alias) else cloned(written[name])
    model.save_pretrained(folder, state_dict=dict(written), save_original_format=published)
    portable.write_config_(folder, dtype_name(dtype))
    return written


def _declared(decoder: Decoder, alias: str) -> bool:
    """Whether the architecture itself ties a parameter to another."""
    return alias in decoder.model.all_tied_weights_keys


def write_training(model: PreTrainedModel, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write the files that plain transformers loads, and the deltas apart, for `read_training_`."""
    write_dense(model, folder, state, published=False)
    if factors := deltas.tensors(Decoder(model)):
        save_file(factors, folder / DELTAS)


def read_training_(model: PreTrainedModel, folder: Path) -> None:
    """Overwrite a model's weights with those of `write_training` for the same structure.

    Raises:
        ModelError: the files are missing, damaged or of another structure, or a masked weight is not zero.
    """
    decoder = Decoder(model)
    kept = masks.held(decoder)
    with structure.reading(f"the weights in {str(folder)!r} cannot be read"):
        state = {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}
        state = structure.stripped(decoder, state, folder)
        if ranks := deltas.ranks(decoder):
            plain = {f"{path}.weight" for path in ranks}  # multiplied out
            state = {name: tensor for name, tensor in state.items() if name not in plain} | load_file(folder / DELTAS)
        loaded = model.load_state_dict(state, strict=False)
        masks.hold_(decoder, kept)
    missing = set(loaded.missing_keys) - set(structure.aliases(model))
    if missing or loaded.unexpected_keys:
        told = f"missing {sorted(missing)[:3]}, unexpected {sorted(loaded.unexpected_keys)[:3]}"
        raise ModelError(f"the weights in {str(folder)!r} are of another model: {told}")


def restore_(decoder: Decoder, manifest: Mapping[str, Any], folder: Path) -> None:
    """Give a decoder from a dense checkpoint the structure and the masks of its manifest.

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
    with structure.reading(f"the masks in {str(folder)!r} do not fit"):
        check_hash(hash_file(file), manifest.get("masks_sha256"), file)
        bits = load_file(file)
        masks.hold_(decoder, {name: masks.unpack(bits[name], tuple(shape)) for name, shape in shapes.items()})


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
    """Return the manifest, ``layerfold.json``; None where there is none.

    Raises:
        ModelError: the manifest is damaged, or of another version.
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
    """SHA-256 over a model, whatever files it came from.

    It covers names, dtypes, shapes and values of all tensors, the ties, the configuration, and the masks. Numbers in
    half precision count as the float32 numbers that they equal.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in readback.OF_THE_FILES}
    known = {"aliases": structure.aliases(model), "config": config}
    digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        dtype = torch.float32 if tensor.dtype in (torch.bfloat16, torch.float16) else tensor.dtype
        digest.update(f"{name}:{dtype}:{tuple(tensor.shape)};".encode())
        for piece in tensor.contiguous().view(-1).split(_PIECE):
            digest.update(memoryview(piece.to(dtype).cpu().view(torch.uint8).numpy()))
    for name, mask in masks.held(Decoder(model)).items():
        digest.update(f"{name}#mask;".encode())
        digest.update(masks.pack(mask).numpy().tobytes())
    return digest.hexdigest()


def bytes_on_disk(decoder: Decoder, format: Format, dtype: torch.dtype | None = None) -> int:
    """Return the size of the weights' files, written to a temporary folder in this dtype or the model's own."""
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
    """Suppress the progress bars and warnings of transformers; our own checks raise errors instead."""
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
