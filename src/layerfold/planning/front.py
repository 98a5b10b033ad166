"""The search for the best configuration of each size, and for the one that a budget asks for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import ceil

from layerfold.checkpoint.model import Model
from layerfold.errors import InputError
from layerfold.methods import Drop, Method, Thin
from layerfold.methods.thin.versions import Shape
from layerfold.planning.budget import Budget
from layerfold.planning.candidates import WHOLE, Configuration, narrowed, rivals, sizes
from layerfold.planning.speed import Speeds, timed_beside
from layerfold.planning.trials import Evaluation, Fast, Trials
from layerfold.progress import Progress
from layerfold.search.stages import Blocks

Built = tuple[Evaluation, Model]
"""A configuration with its whole repair, and the model."""

_PRECISION = 0.015
"""Width at which the bisection for the smallest size stops, as a share of the model's parameters."""

_SMALLEST = 0.1
_CORRECTIONS = 3
_BEGIN = 3
"""A search begins with a third of the blocks that would have to go if nothing else did."""

_CLOSE = 1.05
"""Speed-up, divided by the budget's, that is near enough to stop."""


class Front:
    """Tries what a budget asks for.

    For a size there is one configuration for each number of dropped blocks: neurons and heads of the rest are removed
    down to the size. Perplexity falls and then rises with that number, so a descent from the best of a size near by
    needs few trials.

    Args:
        rivals: try what each method by itself comes to.
        multiple_of: remove as many neurons and heads from each block; None lets blocks differ.
        beside: the other of the two, to be shown beside what is chosen from.
    """

    def __init__(
        self,
        trials: Trials,
        budget: Budget,
        progress: Progress,
        timed: Speeds | None = None,
        *,
        rivals: bool = True,
        multiple_of: int | None = None,
        beside: int | None = None,
    ) -> None:
        self._trials, self._budget, self._progress, self._timed = trials, budget, progress, timed
        self._rivals, self._multiple_of, self._beside = rivals, multiple_of, beside
        self._decoder, self._base = trials.model.decoder, trials.base()
        self._thins = False
        self.tried: dict[Evaluation, None] = {}

    def decide(self, points: int) -> list[Evaluation]:
        """Return the trials within the budget, the best first; of a rise of perplexity, the smallest first.

        Args:
            points: number of further sizes to try, where the budget is a size.

        Raises:
            InputError: nothing that was tried is within the budget.
        """
        kind, value = self._budget.kind, self._budget.value
        if kind == "perplexity":
            self._try_rivals(self._smallest(self._limit))
            within = [trial for trial in self.tried if trial.perplexity <= self._limit]
            within.sort(key=lambda trial: (trial.parameters, trial.perplexity))
        else:
            if kind == "parameters":
                self._sizes(round(value), points)
            else:
                self._fast()
            within = [trial for trial in self.tried if kind == "speedup" or trial.parameters <= value]
            within.sort(key=lambda trial: (trial.perplexity, trial.parameters))
        if self._timed is None:  # else a correction may ask again
            self._trials.clear()
        ranked = [trial for trial in within if math.isfinite(trial.perplexity)]
        if not ranked:
            raise InputError(self._none())
        return ranked

    def best(self, points: int, finalists: int, rounds: int) -> Built:
        """Return the trial to take, repaired on all of the text, with its model.

        Args:
            points: see `decide`.
            finalists: number of trials that are repaired on all of the text. For a rise of perplexity instead as many
                as it takes to find one within it, or all, of which the one least above it is taken.
            rounds: of each timing.

        Raises:
            InputError: nothing is within the budget.
        """
        built = self._final(self.decide(points), finalists)
        if self._timed is not None:
            built = self._in_time(self._timed, built, finalists, rounds)
            self._trials.clear()
        return built

    @property
    def _limit(self) -> float:
        return self._budget.value * self._base.perplexity

    def _in_time(self, timed: Speeds, built: Built, finalists: int, rounds: int) -> Built:
        """Time what was built and correct the predicted latencies by it, until it is as fast as asked for, not faster.

        Returns:
            The best of the models that were fast enough; the last one where none was.
        """
        best: Built | None = None
        for left in reversed(range(_CORRECTIONS + 1)):
            reached = timed_beside(self._trials.model, built[1], rounds, self._progress)[1].speedup.value
            if self._budget.meets(reached) and (best is None or built[0].perplexity < best[0].perplexity):
                best = built
            if not left or self._budget.value <= reached <= _CLOSE * self._budget.value:
                break
            self._timed = timed = replace(timed, correction=timed.correction * 1.01 * self._budget.value / reached)
            self.tried.clear()
            ranked = self.decide(0)
            if ranked[0].configuration == built[0].configuration:
                break
            built = self._final(ranked, finalists)
        return best or built

    def _final(self, ranked: Sequence[Evaluation], finalists: int) -> Built:
        rising = self._budget.kind == "perplexity"
        best: tuple[Evaluation, Model | None] | None = None
        for trial in ranked if rising else ranked[:finalists]:
            repaired, made = self._trials.whole(trial.configuration)
            met = rising and repaired.perplexity <= self._limit
            if met or best is None or repaired.perplexity < best[0].perplexity:
                best = repaired, made
            del made
            if met:  # the smallest: they come first
                break
        assert best is not None
        return best[0], best[1] or self._trials.made(best[0].configuration)

    def _sizes(self, size: int, points: int) -> None:
        """Try the budget's size, and others on the way to it from the model's."""
        whole = self._base.parameters
        others = [round(whole - number / (points + 1) * (whole - size)) for number in range(1, points + 1)]
        if not all(self._try_thin(each) for each in (*others, size)):
            dropped = self._best_at(size, round(self._enough(size) / _BEGIN))
            for number, other in enumerate(others, 1):
                self._best_at(other, round(number / (points + 1) * (dropped or 0)))
        self._try_rivals(size)

    def _try_thin(self, budget: int | Fast) -> bool:
        """Try the best of the library for a size or a speed; return whether there is one that is not the model."""
        choice = None if self._multiple_of is not None else self._trials.thinned(budget)
        if choice is None or choice == tuple(map(Shape, self._decoder.heads, self._decoder.d_ffn)):
            return False
        self._thins = True
        self._try(Configuration(Thin.name, (Thin.of(choice),), WHOLE))
        return True

    def _smallest(self, limit: float) -> int:
        """Return the smallest size with a trial within a limit of perplexity, by bisection."""
        low, high, whole = _SMALLEST, 1.0, self._base.parameters
        dropped = 1
        while high - low > _PRECISION:
            middle = (low + high) / 2
            near = round(dropped * (1 - middle) / (1 - high)) if high < 1 else dropped
            size = round(middle * whole)
            found = dropped if self._try_thin(size) else self._best_at(size, near)
            if found is not None and any(
                trial.perplexity <= limit and trial.parameters <= middle * whole for trial in self.tried
            ):
                high, dropped = middle, found
            else:
                low = middle
        return round(high * whole)

    def _fast(self) -> None:
        """Try what is predicted to be fast enough: of each depth the widest, and methods that remove whole blocks."""
        assert self._timed is not None
        fast_enough = Fast(self._timed, self._budget.value)
        if self._try_thin(fast_enough):
            if self._rivals and (blocks := self._trials.dropped(fast_enough)):
                size = sizes(self._decoder, _dropping(blocks)).parameters
                self._try_all([each for each in self._alone(size, [blocks]) if _removes_blocks(each)])
            return
        fast: list[Configuration | None] = []
        methods: list[Method] = []
        for blocks in self._sets():
            methods = _dropping(blocks)
            share = self._timed.share(self._decoder.n_blocks - len(blocks), self._budget.value)
            if share is None or (share == 1 and not blocks):  # never the model itself, whatever is predicted
                continue
            left = sizes(self._decoder, methods)
            fast.append(self._combined(blocks, left.parameters - ceil((1 - share) * left.units)))
            if share == 1:
                fast += [each for each in self._alone(left.parameters) if _removes_blocks(each)]
                break
        # Where none is predicted to be, the one of fewest blocks is timed all the same: a prediction may be wrong.
        wanted = [each for each in fast if each is not None]
        self._try_all(wanted or [Configuration("drop", tuple(methods), WHOLE)])

    def _best_at(self, size: int, near: int) -> int | None:
        """Descend among the configurations of a size, from the one nearest to a number of dropped blocks.

        Returns:
            The number that the best drops; None where no number reaches the size.
        """
        known: dict[int, Configuration | None] = {}

        def at(dropped: int) -> Configuration | None:
            if dropped not in known:
                inside = 0 <= dropped < self._decoder.n_blocks
                blocks = self._trials.without(dropped) if inside else None
                known[dropped] = None if blocks is None else self._combined(blocks, size)
            return known[dropped]

        best = next(filter(at, sorted(range(self._decoder.n_blocks), key=lambda dropped: abs(dropped - near))), None)
        here: int | None = None
        while best is not None and best != here:
            here = best
            around = {number: there for number in (here, here - 1, here + 1) if (there := at(number))}
            best = min(around, key=lambda number: self._try(around[number]).perplexity)
        return best

    def _sets(self) -> Iterator[Blocks]:
        """Yield sets of blocks to drop, each one larger than the one before, for as long as they are asked for."""
        for number in range(self._decoder.n_blocks):
            blocks = self._trials.without(number)
            if blocks is None:
                return
            yield blocks

    def _combined(self, blocks: Blocks, size: int) -> Configuration | None:
        methods = narrowed(self._decoder, _dropping(blocks), size, self._multiple_of)
        return Configuration(" + ".join(method.name for method in methods), methods, WHOLE) if methods else None

    def _try(self, configuration: Configuration) -> Evaluation:
        trial = self._trials.quick(configuration)
        self.tried.setdefault(trial)
        return trial

    def _try_all(self, configurations: Sequence[Configuration]) -> None:
        for each in self._progress.track(configurations, "trying what each method comes to", len(configurations)):
            self._try(each)

    def _alone(self, size: int, order: Iterable[Blocks] | None = None) -> Iterator[Configuration]:
        """Yield what each method by itself comes to at a size; `order` has the blocks to drop: see `rivals`."""
        if order is None:
            blocks = self._trials.dropped(size) if self._thins else None
            order = self._sets() if blocks is None else [blocks]
        return rivals(self._decoder, size, order, self._multiple_of) if self._rivals else iter(())

    def _try_rivals(self, size: int) -> None:
        if self._rivals:
            self._try_all([*self._alone(size)])
            if (other := narrowed(self._decoder, (), size, self._beside)) and len(other) == 1:
                self._trials.quick(Configuration("prune", other, WHOLE))

    def _enough(self, size: int) -> int:
        """Return the number of blocks to drop where nothing else goes."""
        depth = self._decoder.n_blocks
        last = ((number, [Drop(blocks=tuple(range(depth - number, depth)))]) for number in range(1, depth))
        small = (number for number, methods in last if sizes(self._decoder, methods).parameters <= size)
        return next(small, depth - 1)

    def _none(self) -> str:
        asked = f"{self._budget.kind} {self._budget.value:,.6g}: nothing that was tried is within that"
        if not self.tried:
            return f"{asked}: no number of blocks, neurons and heads to remove comes to it"
        best = min(trial.perplexity for trial in self.tried) / self._base.perplexity
        smallest = min(trial.parameters for trial in self.tried)
        return f"{asked}; the smallest has {smallest:,} parameters, the best perplexity is {best:.3f} times the base's"


def _removes_blocks(configuration: Configuration) -> bool:
    return any(method.removes_blocks for method in configuration.methods)


def _dropping(blocks: Blocks) -> list[Method]:
    return [Drop(blocks=blocks)] if blocks else []
