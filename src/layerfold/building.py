"""From what a recipe says to typed settings, and from what is wrong with it to one line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from layerfold.errors import InputError, one_of


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
