"""Steps: several methods, one after the other."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from layerfold.errors import InputError
from layerfold.methods.base import Method
from layerfold.model.decoder import Decoder

_MOST = 8


@dataclass(frozen=True)
class Steps:
    """Edit a decoder by several methods, each of which finds it as the one before it left it.

    A repair follows the last of them, and its targets are the states of the decoder before the first.

    Attributes:
        methods: two or more; each says all that it does, and leaves nothing to a search.
    """

    methods: tuple[Method, ...]
    name: ClassVar[str] = "steps"

    def __post_init__(self) -> None:
        if not 2 <= len(self.methods) <= _MOST:
            raise InputError(f"{len(self.methods)} steps; accepted: 2 ... {_MOST}")
        for method in self.methods:
            for setting in ("window", "groups"):
                if getattr(method, setting, None) == "auto":
                    raise InputError(f"{setting} auto in a step; accepted: which, as a search by itself finds")

    @property
    def needs_calibration(self) -> bool:
        """Whether any of them reads activations."""
        return any(method.needs_calibration for method in self.methods)

    def resolved(self, decoder: Decoder) -> dict[str, Any]:
        """Return the first as resolved, and the others as they are: what they come to, those before them decide."""
        first, *rest = self.methods
        others = [{"name": method.name, **asdict(method)} for method in rest]  # type: ignore[call-overload]
        return {"name": self.name, "steps": [first.resolved(decoder), *others]}


def in_order(method: Method | Steps) -> tuple[Method, ...]:
    """Return the steps of a method, itself where it has none."""
    return method.methods if isinstance(method, Steps) else (method,)
