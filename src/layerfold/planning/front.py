"""The search for the best candidate of each size, and for the one that a budget asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from math import ceil

from layerfold.errors import InputError
from layerfold.hub import Model
from layerfold.methods import Drop, Method
from layerfold.planning.budget import Budget
from layerfold.planning.forms import WHOLE, Candidate, narrowed, rivals, sizes
from layerfold.planning.speed import Speeds, timed_beside
from layerfold.planning.trials import Trial, Trials
from layerfold.progress import Progress
from layerfold.search.stages import Blocks

Tried = tuple[Candidate, Trial]

_PRECISION = 0.015
"""How near the smallest size within a rise of perplexity is found, as a share of the model's parameters."""

_SMALLEST = 0.1
_CORRECTIONS = 3
_CLOSE = 1.05
"""How much faster than asked for is fast enough to stop."""


class Front:
    """Tries what a budget asks for.

    Of a size there is a candidate for each number of blocks to drop: what is left is cut down to the size by removing
    neurons and heads. Perplexity falls and then rises with that number, so that going downhill from the best of a size
    near by finds the best of this one in a few trials.
    """

    def __init__(
        self,
        trials: Trials,
        budget: Budget,
        progress: Progress,
        timed: Speeds | None = None,
        *,
        rivals: bool = True,
    ) -> None:
        self._trials, self._budget, self._progress, self._timed = trials, budget, progress, timed
        self._rivals = rivals
        self._decoder = trials.model.decoder
        self._size = trials.base().parameters
        self._order: list[Blocks] = trials.order(self._most())
        self.tried: dict[Trial, Candidate] = {}

    def decide(self, points: int) -> list[Candidate]:
        """Return the candidates within the budget, the best first; of a rise of perplexity, the smallest first.

        Args:
            points: how many sizes to try besides the budget's, where it is one of size.

        Raises:
            InputError: nothing that was tried is within the budget.
        """
        budget, base = self._budget, self._trials.base()
        if budget.kind == "perplexity":
            limit = budget.value * base.perplexity
            size = self._smallest(limit)
            self._try_rivals(size)
            within = [trial for trial in self.tried if trial.perplexity <= limit]
            ranked = sorted(within, key=lambda trial: (trial.parameters, trial.perplexity))
        else:
            if budget.kind == "parameters":
                self._sizes(round(budget.value), points)
                within = [trial for trial in self.tried if trial.parameters <= budget.value]
            else:
                within = self._fast()
            ranked = sorted(within, key=lambda trial: (trial.perplexity, trial.parameters))
        ranked = [trial for trial in ranked if math.isfinite(trial.perplexity)]
        if not ranked:
            raise InputError(self._none())
        return [self.tried[trial] for trial in ranked]

    def best(self, points: int, finalists: int, rounds: int) -> tuple[Candidate, Model]:
        """Return the candidate to take, with the model that it makes, repaired on all of the text.

        Args:
            points: see `decide`.
            finalists: how many are repaired on all of the text; for a rise of perplexity as many as it takes to find
                one that is within it then, or all, of which the one that is least above it is taken.
            rounds: of each timing.

        Raises:
            InputError: nothing is within the budget.
        """
        found = self._final(self.decide(points), finalists)
        return found if self._timed is None else self._in_time(self._timed, *found, finalists, rounds)

    def _in_time(
        self, timed: Speeds, chosen: Candidate, made: Model, finalists: int, rounds: int
    ) -> tuple[Candidate, Model]:
        """Correct the line by timing what it led to, until that is as fast as asked for and hardly faster.

        Returns:
            The best of those that were fast enough; the last one where none was.
        """
        best: tuple[float, Candidate, Model] | None = None
        for left in reversed(range(_CORRECTIONS + 1)):
            reached = timed_beside(self._trials.model, made, rounds, self._progress)[1].speedup.value
            perplexity = self._trials.whole(chosen)[0].perplexity
            if self._budget.meets(reached) and (best is None or perplexity < best[0]):
                best = perplexity, chosen, made
            if not left or self._budget.value <= reached <= _CLOSE * self._budget.value:
                break
            self._timed = timed = replace(timed, correction=timed.correction * 1.01 * self._budget.value / reached)
            self._order = self._trials.order(self._most())
            self.tried.clear()
            ranked = self.decide(0)
            if ranked[0] == chosen:
                break
            chosen, made = self._final(ranked, finalists)
        return best[1:] if best else (chosen, made)

    def _final(self, ranked: Sequence[Candidate], finalists: int) -> tuple[Candidate, Model]:
        rising = self._budget.kind == "perplexity"
        limit = self._budget.value * self._trials.base().perplexity
        best: tuple[float, Candidate, Model | None] | None = None
        for candidate in ranked if rising else ranked[:finalists]:
            trial, made = self._trials.whole(candidate)
            if rising and trial.perplexity <= limit:
                return candidate, made or self._trials.made(candidate)  # the smallest: they come first
            if best is None or trial.perplexity < best[0]:
                best = trial.perplexity, candidate, made
            del made
        assert best is not None
        return best[1], best[2] or self._trials.made(best[1])

    def _sizes(self, size: int, points: int) -> None:
        """Try the budget's size, and others on the way to it from the model's."""
        most = len(self._order) - 1
        dropped = self._best_at(size, most // 3)
        for number in range(1, points + 1):
            part = 1 - number / (points + 1)
            self._best_at(round(self._size - part * (self._size - size)), round(part * (dropped or 0)))
        self._try_rivals(size)

    def _smallest(self, limit: float) -> int:
        """Return the smallest size with a candidate within a limit of perplexity, by bisection."""
        low, high = _SMALLEST, 1.0
        dropped = 1
        while high - low > _PRECISION:
            middle = (low + high) / 2
            near = round(dropped * (1 - middle) / (1 - high)) if high < 1 else dropped
            found = self._best_at(round(middle * self._size), near)
            if found == len(self._order) - 1 < self._decoder.n_blocks - 1:
                # As many as were looked for: more may be better.
                self._order = self._trials.order(self._decoder.n_blocks - 1)
                found = self._best_at(round(middle * self._size), found)
            if found is not None and any(
                trial.perplexity <= limit and trial.parameters <= middle * self._size for trial in self.tried
            ):
                high, dropped = middle, found
            else:
                low = middle
                if found is None and len(self._order) < self._decoder.n_blocks:
                    self._order = self._trials.order(self._decoder.n_blocks - 1)
        return round(high * self._size)

    def _fast(self) -> list[Trial]:
        """Try what is fast enough: of each depth the widest, and whole blocks by themselves."""
        assert self._timed is not None
        fast = []
        for dropped in range(len(self._order)):
            methods = self._dropping(dropped)
            share = self._timed.share(self._decoder.n_blocks - dropped, self._budget.value)
            if share is None:
                continue
            left = sizes(self._decoder, methods)
            fast.append(self._combined(dropped, left.parameters - ceil((1 - share) * left.units)))
            if share == 1:
                others = rivals(self._decoder, left.parameters, self._order) if self._rivals else ()
                fast += [each for each in others if each.family in ("drop", "collapse")]
                break
        wanted = [each for each in fast if each is not None]
        # Where the line says that none is, the one of fewest blocks is timed all the same: a line is no measurement.
        deepest = Candidate("drop", tuple(self._dropping(len(self._order) - 1)), WHOLE)
        self._try_all(wanted or [deepest])
        return list(self.tried)

    def _best_at(self, size: int, near: int) -> int | None:
        """Try candidates of a size, beginning with one that lacks so many blocks; return how many the best lacks."""
        open_ = {dropped: self._combined(dropped, size) for dropped in range(len(self._order))}
        there = {dropped: each for dropped, each in open_.items() if each is not None}
        if not there:
            return None

        def cost(dropped: int) -> float:
            return self._try(there[dropped]).perplexity

        here = min(there, key=lambda dropped: abs(dropped - near))
        while True:
            around = [dropped for dropped in (here, here - 1, here + 1) if dropped in there]
            best = min(around, key=cost)
            if best == here:
                return here
            here = best

    def _combined(self, dropped: int, size: int) -> Candidate | None:
        methods = narrowed(self._decoder, self._dropping(dropped), size)
        if not methods:
            return None
        names = [method.name for method in methods]
        return Candidate(" + ".join(names), methods, WHOLE)

    def _dropping(self, number: int) -> list[Method]:
        return [Drop(blocks=self._order[number])] if number else []

    def _try(self, candidate: Candidate) -> Trial:
        trial = self._trials.quick(candidate)
        self.tried.setdefault(trial, candidate)
        return trial

    def _try_all(self, candidates: Sequence[Candidate]) -> None:
        for candidate in self._progress.track(candidates, "trying what each method comes to", len(candidates)):
            self._try(candidate)

    def _try_rivals(self, size: int) -> None:
        if self._rivals:
            self._try_all([*rivals(self._decoder, size, self._order)])

    def _most(self) -> int:
        """How many blocks to drop at most."""
        depth, budget = self._decoder.n_blocks, self._budget
        if budget.kind == "perplexity":
            return max(1, depth // 2)
        if self._timed is not None:
            enough = (k for k in range(1, depth) if self._timed.share(depth - k, budget.value) == 1)
        else:
            # One more: those that are dropped in the end may be smaller than these.
            last = ((k, [Drop(blocks=tuple(range(depth - k, depth)))]) for k in range(1, depth))
            enough = (k for k, methods in last if sizes(self._decoder, methods).parameters <= budget.value)
        return min(next(enough, depth - 1) + 1, depth - 1)

    def _none(self) -> str:
        budget, base = self._budget, self._trials.base()
        asked = f"{budget.kind} {budget.value:,.6g}: nothing that was tried is within that"
        if not self.tried:
            return f"{asked}: no number of blocks, neurons and heads to remove comes to it"
        best = min(trial.perplexity for trial in self.tried) / base.perplexity
        smallest = min(trial.parameters for trial in self.tried)
        return f"{asked}; the smallest has {smallest:,} parameters, the best perplexity is {best:.3f} times the base's"
