"""Settings: from a recipe's YAML to frozen dataclasses, and errors in one line."""

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
    """Build the registered class of this name from its settings.

    Args:
        kind: the registry's noun, for the message.
        config: settings by name; None means no settings.

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
        # From JSON types: a list is accepted as a tuple, but not 2.5 or "2" as an integer.
        return TypeAdapter(registry[name]).validate_json(TypeAdapter(Any).dump_json(config), strict=True)
    except ValidationError as error:
        raise InputError(f"{name}{describe(error)}") from error


def describe(error: ValidationError) -> str:
    """Return pydantic's first error in one line, with its place in the recipe."""
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


def check_least(configured: Any, noun: str = "", **least: int) -> None:
    """Raise InputError for the first setting below its least value; None is accepted.

    Args:
        noun: begins the message.
        least: least accepted value by the setting's name.
    """
    for name, smallest in least.items():
        value = getattr(configured, name)
        if value is not None and value < smallest:
            raise InputError(f"{noun} {name} {value}; accepted: {smallest} or more".lstrip())


class _Loader(yaml.SafeLoader):
    """YAML 1.1, except that 1e-3 is a number, not text, and 3:4 is text, not 184."""


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
    """Read one value in a recipe's YAML.

    Raises:
        InputError: it is not YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"value {text!r} is not YAML: {getattr(error, 'problem', None) or error}") from error


def read_yaml(path: Path, keys: Iterable[str]) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Args:
        keys: accepted keys, for the message.

    Raises:
        RecipeError: the file cannot be read, or does not hold a mapping.
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
    """Return a mapping as YAML for `read_yaml`."""
    text: str = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)
    return text
