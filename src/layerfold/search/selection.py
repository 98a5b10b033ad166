"""Strategies, and the choice among candidates: by all of the text, or by a race that gives up on the hopeless."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import chain, combinations
from math import comb
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from layerfold.errors import InputError
from layerfold.maths.intervals import Floats
from layerfold.progress import Progress
from layerfold.search.scores import Objective, Scores
from layerfold.search.stages import Blocks

Groups = Mapping[int, Sequence[Blocks]]
"""Candidates by the number of blocks that they lack: those of one number compete with each other."""

RACE = "race-2"
"""Version of the rules of a race; version 1 gave up at a confidence of 0.999 in each comparison, of any number."""

CHANCE = 0.01
"""Largest probability that a race gives up the best candidate of any group, over a whole search."""

FIRST_ROUND = 4
"""Number of windows that all candidates are measured on. Windows, not their tokens, which are alike, are the units of
the sample; fewer of them tell nothing of how they differ."""


class Selection:
    """Measures candidates and picks the best of each group.

    With `race`, candidates are measured on four windows, and in each further round on half as many again. A candidate
    is given up as soon as its paired difference to the last of the leaders is significant, by Student's t. Windows come
    in a random order and without replacement, so the standard error shrinks to nothing as all of the text is read
    (finite population correction): the candidates that are left then have been measured exactly. Without a race, all of
    the text is read at once.

    The best of a group is lost where another one seems better in one of the rounds. `chance` is divided among all of
    these comparisons (Bonferroni), so that it bounds the sum of their errors. Call number i of a selection (a beam
    makes one for each size) takes 1 / (i (i + 1)) of it: the shares of any number of calls add up to 1 at most.

    Args:
        seed: orders the windows of a race.
        chance: largest probability that a race gives up the best candidate of any group, over all calls.

    Attributes:
        finished: the candidates that were measured on all of the text, in the order of their groups.
        given_up: number of the others.
        scored, all_windows: times that a candidate was scored on a window, in all and without a race.

    Source: the idea is that of Hoeffding races (Maron and Moore, NeurIPS 1994); the bound here is Student's.
    """

    def __init__(
        self,
        scores: Scores,
        objective: Objective,
        *,
        race: bool,
        seed: int,
        progress: Progress,
        chance: float = CHANCE,
    ) -> None:
        self._scores, self._objective, self._progress = scores, objective, progress
        self._chance, self._calls = chance, 0
        order = list(range(len(scores.windows)))
        self._rounds = _rounds(random.Random(seed).sample(order, len(order))) if race else [order]
        self.finished: list[Blocks] = []
        self.given_up = self.scored = self.all_windows = 0

    @property
    def work(self) -> dict[str, int]:
        """Times that a candidate was scored on a window, in all and without a race, as JSON."""
        return {"scored_windows": self.scored, "windows_of_all_candidates": self.all_windows}

    def __call__(self, groups: Groups, keep: int) -> dict[int, list[Blocks]]:
        """Return the best of each group, as many as to keep, best first."""
        running = {count: list(candidates) for count, candidates in groups.items()}
        self.all_windows += sum(map(len, running.values())) * len(self._scores.windows)
        self._calls += 1
        rivals = sum(len(candidates) - 1 for candidates in running.values() if candidates)
        error = self._chance / (self._calls * (self._calls + 1)) / max(1, (len(self._rounds) - 1) * rivals)
        read = 0
        for windows in self._rounds:
            number = sum(map(len, running.values()))
            self.scored += number * (len(windows) - read)
            read = len(windows)
            said = f"{number:,} candidates on {read} windows"
            self._scores.measure(chain(*running.values()), windows, self._progress, said)
            if windows is not self._rounds[-1]:
                running = {count: self._still_running(each, windows, keep, error) for count, each in running.items()}
        self.finished += chain(*running.values())
        return {count: self._ranked(candidates)[:keep] for count, candidates in running.items()}

    def best(self, candidates: Sequence[Blocks]) -> Blocks:
        """Return the best of candidates that all compete with each other."""
        return self({0: candidates}, 1)[0][0]

    def _still_running(self, candidates: list[Blocks], windows: list[int], keep: int, error: float) -> list[Blocks]:
        values = np.stack([self._scores.values(removed, self._objective)[windows] for removed in candidates])
        gone = behind(values, len(self._scores.windows), keep, error)
        self.given_up += int(gone.sum())
        return [removed for removed, given_up in zip(candidates, gone, strict=True) if not given_up]

    def _ranked(self, candidates: list[Blocks]) -> list[Blocks]:
        """Sort candidates, the best first; equal ones in their order, and nan last."""
        means = {removed: self._scores.mean(removed, self._objective) for removed in candidates}
        return sorted(means, key=lambda removed: (np.isnan(means[removed]), means[removed], removed))


def behind(values: Floats, windows: int, keep: int, error: float) -> NDArray[np.bool_]:
    """Tell which candidates are too far behind to be among the best `keep` in the end.

    Args:
        values: (candidates, windows read), sums over the tokens of each window; the windows are a sample.
        windows: number of all windows.
        error: probability that one of two equal candidates is taken for the worse.

    Returns:
        (candidates,).
    """
    read = values.shape[1]
    if len(values) <= keep or read < 2:
        return np.zeros(len(values), dtype=bool)
    last = int(np.argsort(values.sum(1), kind="stable")[keep - 1])
    difference = values - values[last]
    deviation = difference.std(1, ddof=1) * np.sqrt(read * (1 - read / windows))
    gone: NDArray[np.bool_] = difference.sum(1) > -stdtrit(read - 1, error) * deviation
    gone[last] = False
    return gone


def _rounds(order: list[int]) -> list[list[int]]:
    """The first windows, half as many again, ... and all: 4, 6, 9, 14, 21, 32, 48, 72."""
    sizes = [FIRST_ROUND]
    while sizes[-1] < len(order):
        sizes.append(sizes[-1] + (sizes[-1] + 1) // 2)
    return [order[:size] for size in sizes]


Strategy = Literal["exhaustive", "greedy", "beam"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

MOST_CANDIDATES = 10_000
"""Largest number of candidates of a search."""


def check_number(strategy: Strategy, width: int, there: int, counts: range) -> None:
    """Raise InputError for more candidates than `MOST_CANDIDATES`.

    Args:
        there: number of blocks, attentions or FFNs that can be removed.
        counts: numbers to remove.
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
    """Compare all sets of each number of indices; return the best of each number, as many as to keep, best first."""
    return select({count: list(combinations(indices, count)) for count in counts}, keep)


def beam(select: Selection, indices: Sequence[int], counts: range, keep: int, width: int) -> dict[int, list[Blocks]]:
    """Compare the sets that add one index to the best `width` sets of the size below; a width of 1 is greedy.

    Sizes below the first of `counts` are on the way and measured too. Returns what `exhaustive` does.
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
