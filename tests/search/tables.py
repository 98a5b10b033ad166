"""Scores that are made up, so that what a selection must find is known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from layerfold.progress import SILENT, Progress
from layerfold.search.selection import Selection
from layerfold.search.stages import Blocks

Figure = Callable[[Blocks], np.ndarray]
"""(windows,) of nats a token."""


class TableOfScores:
    """Stands in for `Scores`: ten tokens a window, and figures from a function."""

    def __init__(self, figure: Figure, windows: int = 64) -> None:
        self.windows = range(windows)
        self.tokens = np.full(windows, 10.0)
        self._figure = figure
        self.asked: list[tuple[Blocks, int]] = []

    def measure(
        self,
        candidates: Iterable[Blocks],
        windows: Sequence[int] | None = None,
        progress: Progress = SILENT,
        description: str = "",
    ) -> None:
        self.asked += [(removed, len(windows or self.windows)) for removed in candidates]

    def values(self, removed: Blocks, objective: str) -> np.ndarray:
        return 10 * self._figure(removed)

    def mean(self, removed: Blocks, objective: str) -> float:
        return float(self._figure(removed).mean())


def flat(nats: Callable[[Blocks], float], noise: float = 0.0, windows: int = 64) -> TableOfScores:
    """Each candidate scores what `nats` says, with noise that is its own but fixed."""

    def figure(removed: Blocks) -> np.ndarray:
        generator = np.random.default_rng([len(removed), *removed])
        scatter = noise * generator.standard_normal(windows)
        return np.asarray(nats(removed) + scatter - scatter.mean())

    return TableOfScores(figure, windows)


def selection(scores: TableOfScores, *, race: bool, seed: int = 0) -> Selection:
    stand_in: Any = scores
    return Selection(stand_in, "perplexity", race=race, seed=seed, progress=SILENT)
