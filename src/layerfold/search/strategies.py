"""Which candidates a search looks at: all of them, or those that follow from the best so far."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import comb
from typing import Literal, get_args

from layerfold.errors import InputError
from layerfold.search.selection import Selection
from layerfold.search.stages import Blocks

Strategy = Literal["exhaustive", "greedy", "beam"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

MOST_CANDIDATES = 10_000
"""What a search looks at, at most."""


def check_number(strategy: Strategy, width: int, there: int, counts: range) -> None:
    """Raise InputError where a search would look at more than `MOST_CANDIDATES`.

    Args:
        there: how many blocks, attentions or FFNs there are to remove.
        counts: how many to remove.
    """
    if strategy == "exhaustive":
        number = sum(comb(there, count) for count in counts)
        advice = "take strategy beam or greedy, or remove fewer"
    else:
        width = 1 if strategy == "greedy" else width
        number = sum(
            min(comb(there, count), min(width, comb(there, count - 1)) * (there - count + 1))
            for count in range(1, counts.stop)
        )
        advice = f"take a smaller width than {width}, or remove fewer"
    if number > MOST_CANDIDATES:
        raise InputError(
            f"strategy {strategy!r} for {number:,} candidates; accepted: {MOST_CANDIDATES:,} at most; {advice}"
        )


def exhaustive(select: Selection, indices: Sequence[int], counts: range, keep: int) -> dict[int, list[Blocks]]:
    """Look at every set of so many of these indices; return the best of each number, so many, best first."""
    return select({count: list(combinations(indices, count)) for count in counts}, keep)


def beam(select: Selection, indices: Sequence[int], counts: range, keep: int, width: int) -> dict[int, list[Blocks]]:
    """From the best `width` sets of each size, look at those with one index more; a width of 1 is the greedy search.

    Sizes below the first of `counts` are gone through as well, being on the way. Returns what `exhaustive` does.
    """
    best: dict[int, list[Blocks]] = {}
    kept: list[Blocks] = [()]
    for count in range(1, counts.stop):
        grown = {tuple(sorted((*removed, index))) for removed in kept for index in indices if index not in removed}
        found = select({count: sorted(grown)}, max(width, keep))[count]
        kept = found[:width]
        if count in counts:
            best[count] = found[:keep]
    return best
