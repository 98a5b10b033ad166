"""What a checkpoint says so that other versions of transformers read the same model from it.

transformers 5 keeps the rotary settings in ``rope_parameters``, which 4.x does not read: it takes ``rope_theta`` and
``rope_scaling``, and 10,000 where there is none. It also names tokenizer classes that 4.x does not know.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIG, TOKENIZER = "config.json", "tokenizer_config.json"
_FAST = "PreTrainedTokenizerFast"
"""The class that reads a ``tokenizer.json`` in every version."""
_ONLY_5 = {"TokenizersBackend", "PythonBackend", "SentencePieceBackend"}
_OF_THE_MACHINE = ("backend", "is_local", "local_files_only", "name_or_path", "tokenizer_file", "vocab_file")


def write_config_(folder: Path, dtype: str) -> None:
    """Say in a configuration which dtype the weights have, and what older readers look for.

    Code that ``auto_map`` names is left out where it does not lie in the folder: what was saved needs none then.
    """
    config = read(folder / CONFIG)
    config["dtype"] = dtype
    config |= older_rope(config.get("rope_parameters"))
    if any(not (folder / file).is_file() for file in _code_of(config.get("auto_map"))):
        del config["auto_map"]
    write(folder / CONFIG, config)


def older_rope(parameters: Any) -> dict[str, Any]:
    """Return ``rope_theta``, ``rope_scaling`` and ``partial_rotary_factor`` as transformers 4 reads them.

    Nothing where there are no rotary settings, or where they differ between kinds of layers, which 4.x has no common
    keys for.
    """
    if not isinstance(parameters, dict) or "rope_theta" not in parameters:
        return {}
    scaling = {key: value for key, value in parameters.items() if key not in ("rope_theta", "partial_rotary_factor")}
    scaled = scaling.get("rope_type", "default") != "default"
    found = {"rope_theta": parameters["rope_theta"], "rope_scaling": scaling if scaled else None}
    if "partial_rotary_factor" in parameters:
        found["partial_rotary_factor"] = parameters["partial_rotary_factor"]
    return found


def write_tokenizer_config_(folder: Path, tokenizer_class: str | None) -> None:
    """Name the class that the tokenizer came with, and leave out what is true of this machine alone.

    Args:
        tokenizer_class: where it is None, or one that only transformers 5 knows, the class that every version reads is
            named.
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
    """Return the names of the files that an ``auto_map`` takes classes from."""
    classes = auto_map.values() if isinstance(auto_map, dict) else ()
    named = (each for entry in classes for each in (entry if isinstance(entry, list) else [entry]) if each)
    return {f"{name.rpartition('--')[2].rpartition('.')[0]}.py" for name in named}


def read(path: Path) -> dict[str, Any]:
    """Return the JSON document in a file."""
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def write(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON document, its keys in order."""
    path.write_text(json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
