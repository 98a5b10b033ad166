"""The files of a checkpoint, in a folder or on the Hub: their paths, and the dtype of their weights."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from layerfold.environment import DTYPES
from layerfold.errors import InputError, ModelError
from layerfold.memory.mapped import is_mapped, mapped

_STORED = {"F64": "float32", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Default dtype of saved weights, by safetensors' name of the dtype that they came in."""
_POINTER = b"version https://git-lfs"


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without its module, as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def in_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor of floating-point numbers in another dtype, mapped where it was; any other tensor itself.

    Raises:
        InputError: it holds numbers too large for that dtype.
    """
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    converted = mapped(tensor, dtype) if is_mapped(tensor) else tensor.to(dtype)
    if _overflows(converted) and not _overflows(tensor):
        raise InputError(
            f"tensor {name!r} holds {float(tensor.abs().max()):.3g}, too large for {dtype_name(dtype)}; accepted: "
            "bfloat16 or float32"
        )
    return converted


def _overflows(tensor: Tensor) -> bool:
    """Whether a number is infinite. Minimum and maximum take no memory, unlike a mask of all numbers."""
    bounds = torch.stack(tensor.aminmax()) if tensor.numel() else torch.zeros(0)
    # Of a tensor that holds a NaN both are NaN.
    return bool(bounds.isinf().any() or (bounds.isnan().any() and tensor.isinf().any()))


def cast_(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast a model's parameters, in place. Buffers keep their dtype, as the frequencies of rotary embeddings have to.

    Raises:
        InputError: see `in_dtype`.
    """
    for name, parameter in model.named_parameters():
        parameter.data = in_dtype(name, parameter.data, dtype)


def check_pointers(files: Iterable[Path]) -> None:
    """Raise ModelError for a pointer of git-lfs in place of a file."""
    for file in files:
        if file.is_file():
            with file.open("rb") as opened:
                start = opened.read(len(_POINTER))
            if start == _POINTER:
                raise ModelError(
                    f"{str(file)!r} is a git-lfs pointer, not the file itself; run `git lfs pull` in its repository"
                )


def stored_dtype(files: Iterable[Path]) -> tuple[torch.dtype, bool]:
    """Return the dtype of most of the weights in these ``.safetensors`` files, and whether it is that of all.

    Raises:
        ModelError: quantised weights.
        OSError, SafetensorError: a file that cannot be read.
    """
    numbers: Counter[str] = Counter()
    wide = False
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118, it is no dict
                tensor = opened.get_slice(name)
                kind = tensor.get_dtype()
                if kind in _STORED:
                    numbers[_STORED[kind]] += math.prod(tensor.get_shape())
                    wide |= kind == "F64"
                elif name.endswith(".weight"):
                    raise ModelError(
                        f"{str(file)!r} holds {name!r} as {kind}: quantised weights; accepted: float32, bfloat16 or "
                        "float16"
                    )
    return DTYPES[numbers.most_common(1)[0][0]] if numbers else torch.float32, len(numbers) == 1 and not wide


def check_plain(source: str, config: Any) -> None:
    """Raise ModelError for the configuration of quantised weights."""
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
    """Return the path of a checkpoint's file, downloaded first if it is on the Hub; None if there is none."""
    from transformers.utils.hub import cached_file

    place = {key: options[key] for key in ("revision", "local_files_only") if key in options}
    quiet = {f"_raise_exceptions_for_{kind}": False for kind in ("missing_entries", "connection_errors")}
    path = cached_file(source, name, **quiet, **place)
    return None if path is None else Path(path)


def find_weights(source: str, options: Mapping[str, Any]) -> list[Path]:
    """Return the files of weights that transformers reads."""
    whole = find(source, "model.safetensors", options)
    if whole is not None:
        return [whole]
    index = find(source, "model.safetensors.index.json", options)
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index is not None else set()
    return [path for name in sorted(names) if (path := find(source, name, options)) is not None]


def tokenizer_class(source: str, options: Mapping[str, Any]) -> str | None:
    """Return the class of a checkpoint's tokenizer, by its configuration; None where that names none."""
    path = find(source, "tokenizer_config.json", options)
    try:
        name = None if path is None else json.loads(path.read_text(encoding="utf-8")).get("tokenizer_class")
    except (ValueError, AttributeError):
        return None
    return name if isinstance(name, str) else None
