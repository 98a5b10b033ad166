"""YAML as people write it: files that hold recipes, and single values."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from layerfold.errors import InputError, RecipeError
from layerfold.records import write_text


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as the number that everyone means, not, as YAML 1.1 has it, as text; and 3:4 as text, not as 184."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+"), list("-+0123456789")
)
for first, known in _Loader.yaml_implicit_resolvers.items():
    _Loader.yaml_implicit_resolvers[first] = [
        (
            tag,
            re.compile(r"(?!.*:)(?:" + pattern.pattern + ")", pattern.flags)
            if tag.endswith((":int", ":float"))
            else pattern,
        )
        for tag, pattern in known
    ]


def read_value(text: str) -> Any:
    """Read one value as it would stand in a recipe.

    Raises:
        InputError: it is not YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"value {text!r} is not YAML: {getattr(error, 'problem', None) or error}") from error


def read_yaml(path: Path, keys: Iterable[str]) -> dict[str, Any]:
    """Read a file that holds a mapping.

    Args:
        keys: which it may have, to be named where it holds something else.

    Raises:
        RecipeError: it cannot be read, or is not that.
    """
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"recipe {str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark else ""
        raise RecipeError(
            f"recipe {str(path)!r} is not YAML{place}: {getattr(error, 'problem', None) or error}"
        ) from error
    if not isinstance(document, dict):
        raise RecipeError(f"recipe {str(path)!r} holds {type(document).__name__}; accepted: keys {', '.join(keys)}")
    return document


def write_yaml(document: dict[str, Any], path: Path) -> None:
    """Write a mapping as a file that `read_yaml` reads.

    Raises:
        OutputError: the file cannot be written.
    """
    write_text(path, yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120))
