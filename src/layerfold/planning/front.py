"""The search for the best candidate of each size, and for the one that a budget asks for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import ceil

from layerfold.checkpoint.model import Model
from layerfold.errors import InputError
from layerfold.methods import Drop, Method
from layerfold.planning.budget import Budget
from layerfold.planning.candidates import WHOLE, Candidate, narrowed, rivals, sizes
from layerfold.planning.speed import Speeds, timed_beside
from layerfold.planning.trials import Trial, Trials
from layerfold.progress import Progress
from layerfold.search.stages import Blocks

Tried = tuple[Candidate, Trial]

_PRECISION = 0.015
"""How near the smallest size within a rise of perplexity is found, as a share of the model's parameters."""

_SMALLEST = 0.1
_CORRECTIONS = 3
_BEGIN = 3
"""A search begins with a third of the blocks that would have to go if nothing else did."""

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
        self._trials.clear()
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
        dropped = self._best_at(size, round(self._enough(size) / _BEGIN))
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
            if found is not None and any(
                trial.perplexity <= limit and trial.parameters <= middle * self._size for trial in self.tried
            ):
                high, dropped = middle, found
            else:
                low = middle
        return round(high * self._size)

    def _fast(self) -> list[Trial]:
        """Try what is fast enough: of each depth the widest, and whole blocks by themselves."""
        assert self._timed is not None
        fast: list[Candidate | None] = []
        methods: list[Method] = []
        for blocks in self._sets():
            methods = _dropping(blocks)
            share = self._timed.share(self._decoder.n_blocks - len(blocks), self._budget.value)
            if share is None or (share == 1 and not blocks):  # never the model as it is, whatever the line says
                continue
            left = sizes(self._decoder, methods)
            fast.append(self._combined(blocks, left.parameters - ceil((1 - share) * left.units)))
            if share == 1:
                others = rivals(self._decoder, left.parameters, self._sets()) if self._rivals else ()
                fast += [each for each in others if any(method.removes_blocks for method in each.methods)]
                break
        wanted = [each for each in fast if each is not None]
        # Where the line says that none is, the one of fewest blocks is timed all the same: a line is no measurement.
        self._try_all(wanted or [Candidate("drop", tuple(methods), WHOLE)])
        return list(self.tried)

    def _best_at(self, size: int, near: int) -> int | None:
        """Try candidates of a size, beginning with one that lacks so many blocks; return how many the best lacks."""
        found: dict[int, Candidate | None] = {}

        def there(dropped: int) -> bool:
            if dropped not in found:
                inside = 0 <= dropped < self._decoder.n_blocks
                blocks = self._trials.without(dropped) if inside else None
                found[dropped] = None if blocks is None else self._combined(blocks, size)
            return found[dropped] is not None

        def cost(dropped: int) -> float:
            candidate = found[dropped]
            assert candidate is not None
            return self._try(candidate).perplexity

        numbers = sorted(range(self._decoder.n_blocks), key=lambda dropped: abs(dropped - near))
        here = next(filter(there, numbers), None)
        while here is not None:
            around = [dropped for dropped in (here, here - 1, here + 1) if there(dropped)]
            best = min(around, key=cost)
            if best == here:
                break
            here = best
        return here

    def _sets(self) -> Iterator[Blocks]:
        """Yield sets of blocks to drop, each one larger than the one before, for as long as they are asked for."""
        for number in range(self._decoder.n_blocks):
            blocks = self._trials.without(number)
            if blocks is None:
                return
            yield blocks

    def _combined(self, blocks: Blocks, size: int) -> Candidate | None:
        methods = narrowed(self._decoder, _dropping(blocks), size)
        if not methods:
            return None
        names = [method.name for method in methods]
        return Candidate(" + ".join(names), methods, WHOLE)

    def _try(self, candidate: Candidate) -> Trial:
        trial = self._trials.quick(candidate)
        self.tried.setdefault(trial, candidate)
        return trial

    def _try_all(self, candidates: Sequence[Candidate]) -> None:
        for candidate in self._progress.track(candidates, "trying what each method comes to", len(candidates)):
            self._try(candidate)

    def _try_rivals(self, size: int) -> None:
        if self._rivals:
            self._try_all([*rivals(self._decoder, size, self._sets())])

    def _enough(self, size: int) -> int:
        """How many blocks to drop where nothing else goes."""
        depth = self._decoder.n_blocks
        last = ((number, [Drop(blocks=tuple(range(depth - number, depth)))]) for number in range(1, depth))
        small = (number for number, methods in last if sizes(self._decoder, methods).parameters <= size)
        return next(small, depth - 1)

    def _none(self) -> str:
        budget, base = self._budget, self._trials.base()
        asked = f"{budget.kind} {budget.value:,.6g}: nothing that was tried is within that"
        if not self.tried:
            return f"{asked}: no number of blocks, neurons and heads to remove comes to it"
        best = min(trial.perplexity for trial in self.tried) / base.perplexity
        smallest = min(trial.parameters for trial in self.tried)
        return f"{asked}; the smallest has {smallest:,} parameters, the best perplexity is {best:.3f} times the base's"


def _dropping(blocks: Blocks) -> list[Method]:
    return [Drop(blocks=blocks)] if blocks else []
