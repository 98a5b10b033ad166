"""Rows of a study: a label, what makes the row, and the repair that follows."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from layerfold.errors import InputError
from layerfold.methods import METHODS, Steps
from layerfold.origins import Load, Planned, Student
from layerfold.repair.repair import check_level
from layerfold.settings import build, settings_of

_BESIDE = ("label", "repair")
_SOURCES: dict[str, type[Any]] = {**METHODS, Load.name: Load, Student.name: Student, Planned.name: Planned}


class Strict(BaseModel):
    """Part of a recipe: what it does not know is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)


class Variant(Strict):
    """One row of a study: a label, the method that makes it, and the repair that follows."""

    label: str = Field(min_length=1, max_length=60, pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")
    method: Any
    repair: Any = "none"

    def model_post_init(self, context: Any) -> None:
        """Check that the method admits the repair."""
        check_level(self.repair, self.method)

    def to_json(self) -> dict[str, Any]:
        """Return the variant as recipes write it."""
        repair = {} if self.repair == "none" else {"repair": self.repair}
        if isinstance(self.method, Steps):
            made: Any = [{each.name: settings_of(each)} for each in self.method.methods]
        else:
            made = settings_of(self.method)
        return {"label": self.label, self.method.name: made, **repair}


def read_row(value: Any) -> Any:
    """Turn {label: L, merge: {...}} into {label: L, method: Merge(...)}; ``load`` takes a name as well."""
    if not isinstance(value, dict):
        return value
    names = [key for key in value if key not in _BESIDE]
    if len(names) != 1:
        raise InputError(
            f"keys {', '.join(map(str, value)) or 'none'}; accepted: label, repair and one of "
            f"{', '.join(sorted([*_SOURCES, Steps.name]))}"
        )
    name, config = names[0], value[names[0]]
    if name == Steps.name:
        return {key: value[key] for key in _BESIDE if key in value} | {"method": _steps(config)}
    if name == Load.name and isinstance(config, str):
        config = {"model": config}
    return {key: value[key] for key in _BESIDE if key in value} | {
        "method": build("key or method", _SOURCES, name, config)
    }


def _steps(config: Any) -> Steps:
    """Turn [{drop: {...}}, {prune: {...}}] into steps."""
    if not isinstance(config, list) or not all(isinstance(each, dict) and len(each) == 1 for each in config):
        raise InputError("steps; accepted: a list of methods, each with its settings, as - drop: {blocks: 3}")
    return Steps(tuple(build("method", METHODS, *next(iter(each.items()))) for each in config))
