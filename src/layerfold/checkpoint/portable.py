"""Entries by which other versions of transformers read the same model from a checkpoint.

transformers 5 keeps the rotary settings in ``rope_parameters``. 4.x reads ``rope_theta`` and ``rope_scaling`` instead,
and takes 10,000 without them. transformers 5 also names tokenizer classes that 4.x does not know.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIG, TOKENIZER = "config.json", "tokenizer_config.json"
_FAST = "PreTrainedTokenizerFast"
"""Class that reads a ``tokenizer.json`` in every version."""
_ONLY_5 = {"TokenizersBackend", "PythonBackend", "SentencePieceBackend"}
_OF_THE_MACHINE = ("backend", "is_local", "local_files_only", "name_or_path", "tokenizer_file", "vocab_file")


def write_config_(folder: Path, dtype: str) -> None:
    """Add the dtype of the weights, and the entries of older versions, to a folder's configuration.

    An ``auto_map`` to code that is not in the folder is removed: the saved model does not need it.
    """
    config = read(folder / CONFIG)
    config["dtype"] = dtype
    config |= older_rope(config.get("rope_parameters"))
    if any(not (folder / file).is_file() for file in _code_of(config.get("auto_map"))):
        del config["auto_map"]
    write(folder / CONFIG, config)


def older_rope(parameters: Any) -> dict[str, Any]:
    """Return ``rope_theta``, ``rope_scaling`` and ``partial_rotary_factor`` for transformers 4.

    Empty without rotary settings, or where they differ between kinds of layers, for which 4.x has no common keys.
    """
    if not isinstance(parameters, dict) or "rope_theta" not in parameters:
        return {}
    scaling = {key: value for key, value in parameters.items() if key not in ("rope_theta", "partial_rotary_factor")}
    scaled = scaling.get("rope_type", "default") != "default"
    older = {"rope_theta": parameters["rope_theta"], "rope_scaling": scaling if scaled else None}
    if "partial_rotary_factor" in parameters:
        older["partial_rotary_factor"] = parameters["partial_rotary_factor"]
    return older


def write_tokenizer_config_(folder: Path, tokenizer_class: str | None) -> None:
    """Set the tokenizer's class in a folder's configuration, and remove the entries that describe this machine.

    Args:
        tokenizer_class: class of the loaded tokenizer. A class that every version reads replaces None, and any that
            only transformers 5 knows.
    """
    if not (folder / TOKENIZER).is_file():
        return
    config = {key: value for key, value in read(folder / TOKENIZER).items() if key not in _OF_THE_MACHINE}
    known = tokenizer_class or config.get("tokenizer_class")
    config["tokenizer_class"] = _FAST if known is None or known in _ONLY_5 else known
    more = config.pop("extra_special_tokens", None)
    if isinstance(more, list):  # 4.x takes a mapping of that name, and a list of this one
        config["additional_special_tokens"] = more
    elif more is not None:
        config["extra_special_tokens"] = more
    write(folder / TOKENIZER, config)


def _code_of(auto_map: Any) -> set[str]:
    """Return the names of the files whose classes an ``auto_map`` names."""
    classes = auto_map.values() if isinstance(auto_map, dict) else ()
    named = (name for entry in classes for name in (entry if isinstance(entry, list) else [entry]) if name)
    return {f"{name.rpartition('--')[2].rpartition('.')[0]}.py" for name in named}


def read(path: Path) -> dict[str, Any]:
    """Return the JSON document in a file."""
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def write(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON document with sorted keys."""
    path.write_text(json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
