"""From what a recipe says to typed settings, and from what is wrong with it to one line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from layerfold.errors import InputError, RecipeError, one_of


def build(kind: str, registry: Mapping[str, type[Any]], name: Any, config: Any) -> Any:
    """Build what a registry has under a name from the settings given for it.

    Args:
        kind: what is in the registry, for the message.
        config: settings by name; None stands for none.

    Raises:
        InputError: an unknown name or setting, or a value that is not accepted.
    """
    if not isinstance(name, str) or name not in registry:
        raise InputError(f"unknown {kind} {one_of(str(name), registry)}")
    config = {} if config is None else config
    if not isinstance(config, dict):
        raise InputError(f"{name}: {config!r}; accepted: settings, as {{key: value}}")
    accepted = [field.name for field in fields(registry[name]) if field.init]
    for key in config:
        if key not in accepted:
            raise InputError(f"{name}: unknown key {one_of(str(key), accepted)}")
    try:
        # From JSON types: a list is taken for a tuple, but 2.5 or "2" not for an integer.
        return TypeAdapter(registry[name]).validate_json(TypeAdapter(Any).dump_json(config), strict=True)
    except ValidationError as error:
        raise InputError(f"{name}{describe(error)}") from error


def describe(error: ValidationError) -> str:
    """Say the first of pydantic's errors in one line, with the place in the recipe."""
    first = error.errors(include_url=False)[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{place}: unknown key"
    message = first["msg"].removeprefix("Value error, ")
    received = first["input"]
    shown = "" if first["type"] in ("value_error", "missing") else f" (received {received!r})"
    return f"{place}: {message}{shown}"


def settings_of(configured: Any) -> dict[str, Any]:
    """Return a dataclass's settings as JSON."""
    values = {field.name: getattr(configured, field.name) for field in fields(configured) if field.init}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


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


def yaml_text(document: dict[str, Any]) -> str:
    """Return a mapping as text that `read_yaml` reads."""
    text: str = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)
    return text
