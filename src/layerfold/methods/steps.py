"""Steps: several methods, one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from layerfold.calibration import Calibration
from layerfold.errors import InputError
from layerfold.methods.base import Method, Notes
from layerfold.model.decoder import Decoder

_MOST = 8


@dataclass(frozen=True)
class Steps(Method):
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
            if method.searched:
                raise InputError(f"{method.searched} auto in a step; accepted: which, as a search by itself finds")

    @property
    def steps(self) -> tuple[Method, ...]:
        """The methods."""
        return self.methods

    @property
    def needs_calibration(self) -> bool:
        """Whether any of them reads activations."""
        return any(method.needs_calibration for method in self.methods)

    @property
    def removes_blocks(self) -> bool:
        """Whether any of them leaves fewer."""
        return any(method.removes_blocks for method in self.methods)

    def check_repair(self, level: str) -> None:
        """Raise InputError for ``rescale``, and for what any of them does not admit."""
        if level == "rescale":
            raise InputError("repair 'rescale' with several steps; accepted: none, refit, refit+attention")
        for method in self.methods:
            method.check_repair(level)

    def resolved(self, decoder: Decoder) -> dict[str, Any]:
        """Return the first as resolved, and the others as they are: what they come to, those before them decide."""
        first, *rest = self.methods
        others = [{"name": method.name, **method.settings()} for method in rest]
        return {"name": self.name, "steps": [first.resolved(decoder), *others]}

    def to_json(self) -> dict[str, Any]:
        """Return the steps as recipes write them."""
        return {self.name: [method.to_json() for method in self.methods]}

    def apply(self, decoder: Decoder, calibration: Calibration | None) -> Notes:
        """Edit the decoder in place by each method in turn, activations read anew after each."""
        notes: Notes = {}
        for number, method in enumerate(self.methods):
            anew = calibration.of(decoder) if calibration is not None and number else calibration
            notes |= method.apply(decoder, anew)
        return notes
