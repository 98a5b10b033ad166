"""Shared FFNs for peft: a plain model of the shared weights, and a LoRA adapter of the deltas."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from layerfold.checkpoint import readback, structure
from layerfold.checkpoint.model import Model
from layerfold.checkpoint.save import quiet
from layerfold.checkpoint.weights import in_dtype
from layerfold.errors import InputError, MissingExtraError
from layerfold.files import check_folder, writing_folder
from layerfold.model import deltas

BASE, ADAPTER = "base", "adapter"


def check_adapter_folder(directory: Path, *, overwrite: bool) -> None:
    """Check, before long work, that `save_adapter` can write to a folder.

    Raises:
        MissingExtraError: peft is not installed.
        OutputError: one of the two folders in it is not empty and `overwrite` is off.
    """
    if importlib.util.find_spec("peft") is None:
        raise MissingExtraError("peft", "peft")
    for name in (BASE, ADAPTER):
        check_folder(directory / name, overwrite=overwrite)


def save_adapter(model: Model, directory: Path, *, overwrite: bool = False, dtype: torch.dtype | None = None) -> None:
    """Write ``base``, a dense checkpoint of the shared weights, and ``adapter``, the deltas as LoRA's A and B.

    LoRA's A is our B and its B our A, with a scale of 1. The base keeps the biases, which each block has of its own.

    Args:
        overwrite: replace the contents of the two folders.
        dtype: dtype of the base's weights and the deltas; None takes that of the model's checkpoint.

    Raises:
        InputError: the model has no deltas.
        MissingExtraError: peft is not installed.
        OutputError: a folder is not empty and `overwrite` is off, or it cannot be written.
    """
    check_adapter_folder(directory, overwrite=overwrite)
    from peft import LoraConfig, get_peft_model

    factored = {path: module for path, module in deltas.factored(model.decoder).items() if module.rank}
    if not factored:
        raise InputError(f"an adapter of low-rank deltas, and {deltas.NONE}")
    plain = model.of(deltas.shared_alone(model.decoder))
    plain = plain.with_step({"method": {"name": "without deltas"}, "seed": None, "calibration": None, "notes": {}})
    plain.save(directory / BASE, overwrite=overwrite, dtype=dtype)
    ranks = {path: module.rank for path, module in factored.items()}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern=ranks,
        alpha_pattern=ranks,
        target_modules=list(ranks),
        fan_in_fan_out=not any(issubclass(module.stock, torch.nn.Linear) for module in factored.values()),
        init_lora_weights=False,
        inference_mode=True,
    )
    plain.decoder.model.name_or_path = str(directory / BASE)  # the adapter's record of its base
    whole = structure.filled(plain.decoder.model, plain.decoder.model.state_dict())
    with quiet(), _deprecations_hidden(), writing_folder(directory / ADAPTER, overwrite=overwrite) as folder:
        adapted: Any = get_peft_model(plain.decoder.model, config)
        written: dict[str, Tensor] = {}
        for path, module in factored.items():
            layer = adapted.base_model.model.get_submodule(path)
            shape = whole[f"{path}.weight"].shape
            out, inputs = shape if issubclass(module.stock, torch.nn.Linear) else reversed(shape)
            # A narrower FFN has zeros for its missing neurons in the base, and so in the deltas.
            for name, factor in (
                ("lora_A", _widened(module.b, module.rank, inputs)),
                ("lora_B", _widened(module.a, out, module.rank)),
            ):
                key = f"base_model.model.{path}.{name}.weight"
                written[key] = in_dtype(key, factor, plain.saved_dtype if dtype is None else dtype)
                getattr(layer, name)["default"].weight.data = written[key]
        adapted.save_pretrained(str(folder), save_embedding_layers=False)
        readback.check_tensors(folder.glob("*.safetensors"), written)
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty template


def _widened(factor: Tensor, rows: int, columns: int) -> Tensor:
    """Return a copy of a matrix with zeros below and to the right of it."""
    return pad(factor.detach(), (0, columns - factor.shape[1], 0, rows - factor.shape[0])).clone()


@contextlib.contextmanager
def _deprecations_hidden() -> Iterator[None]:
    """Hide peft's warnings about deprecated functions of transformers, which no user can act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
