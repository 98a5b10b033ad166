"""How often a race gives up the best of its candidates, and what share of the windows it scores: made-up figures."""

from __future__ import annotations

from typing import Any

import numpy as np
from shape import Figures, arguments, report

from layerfold.progress import SILENT
from layerfold.search.selection import CHANCE, Selection

WINDOWS = 64
GAPS = {"equal but for chance": 0.0, "spread": 1.0}
"""How far apart candidates' means are: standard deviation over that of one window's figure."""


class Table:
    """Stands in for `Scores`: a figure for each candidate and window."""

    def __init__(self, figures: np.ndarray) -> None:
        self.windows, self._figures = range(figures.shape[1]), figures

    def measure(self, *_: Any, **__: Any) -> None:
        """All is measured."""

    def values(self, candidate: tuple[int, ...], objective: str) -> np.ndarray:
        return np.asarray(self._figures[candidate[0]])

    def mean(self, candidate: tuple[int, ...], objective: str) -> float:
        return float(self._figures[candidate[0]].mean())


def drawn(generator: np.random.Generator, candidates: int, gap: float, skewed: bool) -> np.ndarray:
    """(candidates, windows): a candidate's mean, a window's difficulty, and what is their own."""
    shape = (candidates, WINDOWS)
    noise = np.exp(generator.standard_normal(shape)) if skewed else generator.standard_normal(shape)
    difficulty = 3 * generator.standard_normal(WINDOWS)
    return np.asarray(gap * generator.standard_normal((candidates, 1)) + difficulty + noise)


def measure(candidates: int, gap: float, skewed: bool, searches: int) -> tuple[int, float]:
    """Return how many races lost the best, and the mean share of the windows that they scored."""
    lost, scored = 0, 0.0
    names = [(index,) for index in range(candidates)]
    for seed in range(searches):
        figures = drawn(np.random.default_rng([seed, candidates]), candidates, gap, skewed)
        table: Any = Table(figures)
        select = Selection(table, "perplexity", race=True, seed=seed, progress=SILENT)
        ((best,),) = select({1: names}, 1).values()
        lost += best != (int(figures.sum(1).argmin()),)
        scored += select.scored / select.all_windows / searches
    return lost, scored


def main() -> None:
    options = arguments(__doc__)
    figures: Figures = {"windows": WINDOWS, "chance of a loss, at most": CHANCE}
    for candidates, searches in ((2, 2000), (12, 2000), (66, 1000), (500, 200)):
        searches //= 20 if options.quick else 1
        figures[f"{candidates} candidates, searches"] = searches
        for said, gap in GAPS.items():
            for kind in ("normal", "skewed"):
                lost, scored = measure(candidates, gap, kind == "skewed", searches)
                figures[f"{candidates} candidates, {said}, {kind}: lost"] = lost
                figures[f"{candidates} candidates, {said}, {kind}: lost, of all"] = lost / searches
                figures[f"{candidates} candidates, {said}, {kind}: windows scored, of all"] = scored
    report("race", figures, options.json)


if __name__ == "__main__":
    main()
