"""Checks that written files read back the same, before they replace anything."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from layerfold.checkpoint import portable
from layerfold.errors import OutputError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

OF_THE_FILES = {"_name_or_path", "transformers_version", "dtype", "architectures", "auto_map", "torch_dtype"}
"""Entries of a configuration that describe files, not the model."""


def check_tensors(files: Iterable[Path], wanted: Mapping[str, Tensor], tied: Mapping[str, str] | None = None) -> None:
    """Compare the names, shapes, dtypes and values in ``.safetensors`` files with the tensors in memory.

    Args:
        tied: names that a reader ties, each with the one it is tied to: one of the two is enough.

    Raises:
        OutputError: they differ.
    """
    names: set[str] = set()
    for file in files:
        with safe_open(file, "pt") as opened:
            found = list(opened.keys())
        for name in found:
            if name not in wanted:
                raise OutputError(f"{file.name!r} reads back with {name!r}, which the model does not have")
            # Opened for each tensor: what has been read of a file counts as memory for as long as it is open.
            with safe_open(file, "pt") as opened:
                tensor, own = opened.get_tensor(name), wanted[name]
            if tensor.shape != own.shape or tensor.dtype != own.dtype:
                read, asked = (f"{tuple(side.shape)} {side.dtype}" for side in (tensor, own))
                raise OutputError(f"{file.name!r} reads back with {name!r} as {read}, not {asked}")
            if not torch.equal(_bits(tensor), _bits(own)):
                raise OutputError(f"{file.name!r} reads back with other values of {name!r}")
            del tensor
            names.add(name)
    tied = tied or {}
    there = names | {tied[name] for name in names & tied.keys()}
    if missing := sorted(name for name in wanted.keys() - names if tied.get(name, name) not in there):
        raise OutputError(f"the weights read back without {missing[0]!r} ({len(missing)} missing)")


def as_published(
    model: PreTrainedModel, state: Mapping[str, Tensor], tied: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors, and which of them are tied, by the names that checkpoints of the architecture have.

    GPT-NeoX's head, say, is ``lm_head`` in the model and ``embed_out`` in its checkpoints; experts are one tensor in
    the model and one each there.
    """
    from transformers.core_model_loading import revert_weight_conversion

    published: dict[str, Tensor] = revert_weight_conversion(model, dict(state))
    places = {tensor.data_ptr(): name for name, tensor in published.items()}

    def name_of(name: str) -> str:
        return name if name in published else places.get(state[name].data_ptr(), name)

    return published, {name_of(alias): name_of(name) for alias, name in tied.items()}


def _bits(tensor: Tensor) -> Tensor:
    """Return a tensor's bytes, so that a NaN equals itself and -0.0 does not equal 0.0."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def check_config(folder: Path, model: PreTrainedModel, wanted: Mapping[str, Tensor]) -> None:
    """Compare a configuration with a model's, and the shapes of the model that it builds with these tensors.

    Raises:
        OutputError: they differ.
    """
    from transformers import AutoConfig

    try:
        read = AutoConfig.from_pretrained(folder, trust_remote_code=is_remote(model))
        with torch.device("meta"):  # for the shapes alone
            built = type(model)(read).state_dict()
    except Exception as error:
        raise OutputError(f"the configuration cannot be read back: {first_line(error)}") from error
    compare_configs(read, model.config)
    for name in sorted(built.keys() | wanted.keys()):
        shapes = [tuple(state[name].shape) if name in state else None for state in (built, wanted)]
        if shapes[0] != shapes[1]:
            raise OutputError(
                f"by its configuration the model reads back with {name!r} as {shapes[0]}, not {shapes[1]}"
            )


def compare_configs(read: PreTrainedConfig, own: PreTrainedConfig) -> None:
    """Raise OutputError, which names the first setting in which two configurations differ as JSON."""
    read_back, asked = (json.loads(config.to_json_string(use_diff=False)) for config in (read, own))
    # Some configurations keep what was written for older versions, which their own class does not know.
    older = portable.older_rope(asked.get("rope_parameters"))
    asked |= {key: value for key, value in older.items() if key in read_back and key not in asked}
    for key in sorted((read_back.keys() | asked.keys()) - OF_THE_FILES):
        if read_back.get(key) != asked.get(key):
            raise OutputError(
                f"the configuration reads back with {key} {read_back.get(key)!r:.60}, not {asked.get(key)!r:.60}"
            )


def check_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise OutputError where a folder's tokenizer cannot be read, or has another vocabulary."""
    from transformers import AutoTokenizer

    try:
        read: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=is_remote(tokenizer))
    except Exception as error:
        raise OutputError(f"the tokenizer cannot be read back: {first_line(error)}") from error
    if read.get_vocab() != tokenizer.get_vocab():
        raise OutputError("the tokenizer reads back with another vocabulary")


def is_remote(loaded: object) -> bool:
    """Whether an object runs code from its checkpoint, which the user has then trusted."""
    return type(loaded).__module__.startswith("transformers_modules")
