from __future__ import annotations

import weakref
from itertools import chain, combinations

import pytest
import torch
from torch import Tensor

from layerfold.search.stages import Path, walk


def subsets(n: int) -> list[Path]:
    return list(chain.from_iterable(combinations(range(n), size) for size in range(n + 1)))


class Counted:
    """Writes each stage passed into the states as a digit, and counts steps and states that are alive."""

    def __init__(self) -> None:
        self.steps = 0
        self.alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self.most = 0

    def __call__(self, stage: int, hidden: Tensor) -> Tensor:
        self.steps += 1
        result = hidden * 10 + stage + 1
        self.alive.add(result)
        self.most = max(self.most, len(self.alive))
        return result


def by_digits(path: Path) -> float:
    value = 0.0
    for stage in path:
        value = 10 * value + stage + 1
    return value


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_every_path_ends_in_its_own_stages(n: int) -> None:
    found = {path: float(hidden) for path, hidden in walk(subsets(n), torch.zeros(()), Counted())}
    assert found == {path: by_digits(path) for path in subsets(n)}


def test_paths_that_skip_and_that_branch_by_other_stages() -> None:
    paths = [(0, 5, 2), (4, 1, 2), (0, 1, 2), (0, 5, 6), (), (0,)]
    step = Counted()
    assert {path: float(hidden) for path, hidden in walk(paths, torch.zeros(()), step)} == {
        path: by_digits(path) for path in paths
    }
    assert step.steps == len({path[:end] for path in paths for end in range(1, len(path) + 1)})


@pytest.mark.parametrize("n", [1, 4, 8])
def test_each_prefix_is_stepped_through_once(n: int) -> None:
    step = Counted()
    list(walk(subsets(n), torch.zeros(()), step))
    assert step.steps == 2**n - 1


def test_the_states_held_grow_with_the_depth_and_not_with_the_number_of_paths() -> None:
    held = {}
    for n in (4, 8):
        step = Counted()
        for _ in walk(subsets(n), torch.zeros(()), step):
            pass
        held[n] = step.most
    # The path's own states, and the one that is being made.
    assert held[4] <= 5
    assert held[8] <= 9
