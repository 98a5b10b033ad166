"""A depth-first walk over paths through a decoder's stages: what paths have in common is computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

Path = tuple[int, ...]
"""Stages in the order in which they are passed, as the indices of the blocks that are kept."""


def walk(paths: Iterable[Path], first: Tensor, step: Callable[[int, Tensor], Tensor]) -> Iterator[tuple[Path, Tensor]]:
    """Yield each path with the hidden states at its end, in lexical order.

    In that order the paths with a common prefix stand together, so that the states along the current path are all
    that is held: memory grows with the longest path, not with their number. Each distinct prefix is stepped through
    once: for all subsets of n blocks 2^n - 1 steps, where one by one they are n 2^(n - 1).

    Args:
        paths: distinct.
        first: what the first stage gets.
        step: passes hidden states through one stage and leaves what it is given as it is.
    """
    states = [first]
    current: Path = ()
    for path in sorted(paths):
        shared = _shared_length(current, path)
        del states[shared + 1 :]
        for stage in path[shared:]:
            states.append(step(stage, states[-1]))
        current = path
        yield path, states[-1]


def _shared_length(one: Path, two: Path) -> int:
    """Return how many stages two paths begin with in common."""
    length = 0
    for a, b in zip(one, two, strict=False):
        if a != b:
            break
        length += 1
    return length
