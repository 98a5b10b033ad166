"""Budgets: the size, the speed-up or the rise of perplexity that a plan has to meet."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from layerfold.errors import InputError
from layerfold.methods.prune.method import parse_count

Kind = Literal["parameters", "speedup", "perplexity"]


@dataclass(frozen=True)
class Budget:
    """What a plan has to meet.

    Attributes:
        kind: what is limited.
        value: ``parameters``: distinct ones, at most; ``speedup``: of generating a token, at least; ``perplexity``:
            divided by the model's, at most.
    """

    kind: Kind
    value: float

    def meets(self, figure: float) -> bool:
        """Whether a figure of this kind is within the budget."""
        return figure >= self.value if self.kind == "speedup" else figure <= self.value


def read_budget(
    parameters: str | int | None, speedup: float | None, perplexity: str | None, whole: int | None = None
) -> Budget:
    """Read the one of three that is given: ``82M`` or ``66%`` parameters, a speedup of 1.5, a perplexity of ``+10%``.

    Args:
        whole: the model's number of parameters; None where it is not known yet.

    Raises:
        InputError: none of the three or more than one, or a value out of range.
    """
    if [parameters, speedup, perplexity].count(None) != 2:
        raise InputError(
            f"parameters {parameters!r}, speedup {speedup} and perplexity {perplexity!r}; accepted: one of the three"
        )
    if speedup is not None:
        if not 1 < speedup <= 100:
            raise InputError(f"speedup {speedup}; accepted: above 1 and at most 100, as 1.5")
        return Budget("speedup", speedup)
    if perplexity is not None:
        match = re.fullmatch(r"\s*\+?\s*(\d{1,6}(?:\.\d+)?)\s*%\s*", str(perplexity))
        if not match or not float(match[1]):
            raise InputError(f"perplexity {perplexity!r}; accepted: how much higher it may be, as +10%")
        return Budget("perplexity", 1 + float(match[1]) / 100)
    assert parameters is not None
    kind, value = parse_count("parameters", parameters)
    if whole is None:
        return Budget("parameters", value)
    wanted = round(value * whole) if kind == "fraction" else round(value)
    if not 0 < wanted < whole:
        raise InputError(f"parameters {parameters!r} is {wanted:,}; accepted: below the model's {whole:,}")
    return Budget("parameters", wanted)
