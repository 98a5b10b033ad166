"""The files of a checkpoint, in a folder or on the Hub: where they lie, and in which dtype they hold weights."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from layerfold.environment import DTYPES
from layerfold.errors import InputError, ModelError

_STORED = {"F64": "float32", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""What weights are saved in by default, by the name that safetensors gives to what they came in."""
_POINTER = b"version https://git-lfs"


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without its module, as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def in_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in another dtype, where it holds floating-point numbers; itself otherwise.

    Raises:
        InputError: it holds numbers too large for that dtype.
    """
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    found = tensor.to(dtype)
    if torch.isinf(found).any() and not torch.isinf(tensor).any():
        raise InputError(
            f"tensor {name!r} holds {float(tensor.abs().max()):.3g}, too large for {dtype_name(dtype)}; accepted: "
            "bfloat16 or float32 (--save-dtype)"
        )
    return found


def check_pointers(files: Iterable[Path]) -> None:
    """Raise ModelError for a file that git-lfs has left in the place of another."""
    for file in files:
        if file.is_file():
            with file.open("rb") as opened:
                start = opened.read(len(_POINTER))
            if start == _POINTER:
                raise ModelError(
                    f"{str(file)!r} is a git-lfs pointer, not the file itself; run `git lfs pull` in its repository"
                )


def stored_dtype(files: Iterable[Path]) -> torch.dtype:
    """Return the dtype of most of the weights in these ``.safetensors`` files.

    Raises:
        ModelError: weights that are the codes of a quantiser.
        OSError, SafetensorError: a file that cannot be read.
    """
    held: Counter[str] = Counter()
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118, it is no dict
                tensor = opened.get_slice(name)
                kind = tensor.get_dtype()
                if kind in _STORED:
                    held[_STORED[kind]] += math.prod(tensor.get_shape())
                elif name.endswith(".weight"):
                    raise ModelError(
                        f"{str(file)!r} holds {name!r} as {kind}: quantised weights; accepted: float32, bfloat16 or "
                        "float16"
                    )
    return DTYPES[held.most_common(1)[0][0]] if held else torch.float32


def check_plain(source: str, config: Any) -> None:
    """Raise ModelError for weights that are the codes of a quantiser."""
    quantised = getattr(config, "quantization_config", None)
    if quantised is None:
        return
    known = quantised.to_dict() if hasattr(quantised, "to_dict") else quantised
    method = known.get("quant_method", "of an unknown kind") if isinstance(known, dict) else known
    raise ModelError(
        f"the weights of {source!r} are quantised ({getattr(method, 'value', method)}); accepted: float32, bfloat16 or "
        "float16 weights, as the model was published before it was quantised, or a .gguf file"
    )


def find(source: str, name: str, options: Mapping[str, Any]) -> Path | None:
    """Return where a file of a checkpoint lies, fetched first if it is on the Hub; None if there is none."""
    from transformers.utils.hub import cached_file

    place = {key: options[key] for key in ("revision", "local_files_only") if key in options}
    found = cached_file(
        source,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **place,
    )
    return None if found is None else Path(found)


def find_weights(source: str, options: Mapping[str, Any]) -> list[Path]:
    """Return the files that transformers reads a model's weights from."""
    whole = find(source, "model.safetensors", options)
    if whole is not None:
        return [whole]
    index = find(source, "model.safetensors.index.json", options)
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index is not None else set()
    return [found for name in sorted(names) if (found := find(source, name, options)) is not None]


def tokenizer_class(source: str, options: Mapping[str, Any]) -> str | None:
    """Return what a checkpoint calls its tokenizer's class."""
    path = find(source, "tokenizer_config.json", options)
    try:
        found = None if path is None else json.loads(path.read_text(encoding="utf-8")).get("tokenizer_class")
    except (ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None
