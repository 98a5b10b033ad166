"""Compact checkpoints for transformers' Auto classes, which load them after an import of layerfold."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig

from layerfold.checkpoint import compact
from layerfold.checkpoint.save import quiet, read_manifest
from layerfold.checkpoint.structure import MANIFEST
from layerfold.checkpoint.weights import cast_
from layerfold.errors import InputError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # not at run time: its module may be importing this one

_OF_CONFIG = {"decoder", "model_type", "transformers_version", "architectures", "dtype"}
_OF_PLACE = {"config", "revision", "token", "cache_dir", "local_files_only", "force_download", "proxies"}
_OF_PLACE |= {"adapter_kwargs", "trust_remote_code", "code_revision", "use_safetensors", "weights_only", "_commit_hash"}


class CompactConfig(PreTrainedConfig):
    """Configuration of a folder with a compact checkpoint.

    Attributes:
        decoder: configuration of its decoder, as JSON.
    """

    model_type = compact.MODEL_TYPE

    def __init__(self, decoder: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.decoder = decoder


class CompactForCausalLM:
    """Loads a compact checkpoint as a model of transformers' own class, with its shared tensors."""

    config_class = CompactConfig

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> PreTrainedModel:
        """Load a folder.

        Args:
            options: of transformers' options, ``dtype`` and those that locate a checkpoint.

        Raises:
            InputError: another option, or no folder.
            ModelError: the checkpoint is damaged.
        """
        dtype = _dtype(options.pop("dtype", options.pop("torch_dtype", None)))
        unknown = [name for name, value in options.items() if name not in _OF_PLACE and value is not None]
        unknown += _absorbed(options.get("config"))
        if unknown:
            raise InputError(f"option {unknown[0]!r} for a compact checkpoint; accepted: dtype")
        directory = Path(folder)
        if not directory.is_dir():
            raise InputError(f"compact checkpoint {str(folder)!r}; accepted: a folder, to which it was downloaded")
        manifest = read_manifest(directory)
        if manifest is None:
            raise ModelError(f"the compact checkpoint {str(folder)!r} lacks its {MANIFEST}")
        with quiet():
            model = compact.load(directory, manifest)
        if dtype is not None:
            cast_(model, dtype)
        return model


def _dtype(wanted: object) -> torch.dtype | None:
    if wanted in (None, "auto"):
        return None
    dtype = getattr(torch, wanted.removeprefix("torch."), None) if isinstance(wanted, str) else wanted
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"dtype {wanted!r}; accepted: auto, or a type of floating-point numbers, as float32")
    return dtype


def _absorbed(config: PreTrainedConfig | None) -> list[str]:
    """Name the options that AutoConfig put into the configuration, and does not pass on."""
    if config is None:
        return []
    attention = ["attn_implementation"] if getattr(config, "_attn_implementation", None) else []
    return attention + sorted(config.to_diff_dict().keys() - _OF_CONFIG)


def register_config(configurations: ModuleType) -> None:
    """Register compact checkpoints with AutoConfig; called after the import of its module."""
    configurations.AutoConfig.register(compact.MODEL_TYPE, CompactConfig, exist_ok=True)


def register_model(models: ModuleType) -> None:
    """Register compact checkpoints with AutoModelForCausalLM; called after the import of its module."""
    models.AutoModelForCausalLM.register(CompactConfig, CompactForCausalLM, exist_ok=True)
