"""The library of a plan: versions of each block with fewer heads and neurons, and which of them to take.

Each version is fitted once, in closed form, to the original's own hidden states (see `methods.thin`). A choice is one
shape for each block. What another version of a block would add to the loss of a choice is estimated for all versions of
all blocks at once (see `harms`), on selection text. An integer programme then picks those within the budget with the
least sum of harms. Harms do not add up over many changes. So the size falls in steps, with new estimates at each.

Among whole blocks only, each may stay or go. There the loss is measured by passing the text through the versions, and
the programme is solved for several numbers of changed blocks until nothing is gained.

Source: Bercovich et al., "Puzzle: Distillation-Based NAS for Inference-Optimized LLMs", 2024, section 4, for a library
of blocks and an integer programme; Kurtic et al., "ZipLM", 2023, for a structured search by measured harm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from scipy.optimize import LinearConstraint
from torch import Tensor, nn

from layerfold.inference.holding import beginning
from layerfold.inference.scoring import log_partition, predicting, scored_positions, target_logits
from layerfold.inference.stepping import Stepper, fused_activations
from layerfold.inference.streaming import batch_tokens, taken
from layerfold.maths.programme import taken_least
from layerfold.methods.thin.versions import Shape, walked
from layerfold.model.decoder import Decoder
from layerfold.planning.harms import estimated
from layerfold.progress import SILENT, Progress
from layerfold.search.stages import Path, walk
from layerfold.text.windows import TokenWindows

Choice = tuple[Shape, ...]
"""What each block keeps."""

Costs = Sequence[Mapping[Shape, float]]
"""By block, what each shape costs."""

GONE = Shape(0, 0)

_NEURONS = (0.75, 0.5, 1 / 3, 1 / 6, 1 / 12, 0.0)
"""Shares of its neurons that an FFN may keep, beside all of them."""

_HEADS = (2 / 3, 1 / 3, 0.0)
"""Shares of its groups of heads that an attention may keep, beside all of them."""

_RUNS = (2, 3)
"""Lengths of runs of blocks that a whole block is fitted to replace, itself included."""

_STEPS = (8, 4)
"""The size falls by an eighth of the blocks' at a time, and once more by a quarter."""

_READ = 2_048
"""Selection tokens on which harms are estimated and measured; the results are compared on all."""

_ROUNDS = 20
_ENOUGH = 0.003
"""A gain, in nats a token, below which no further round follows."""

_CHANGES = (8, 6, 4, 3, 2, 1)
"""Numbers of whole blocks that may change in one round, of twelve; of more in proportion."""


@dataclass(frozen=True)
class _Stage:
    """A block as it is passed through: its index, and what takes its place."""

    index: int
    module: nn.Module


@dataclass(frozen=True)
class Limit:
    """What the blocks of a choice may cost together: parameters, or time.

    Attributes:
        amount: the most.
        costs: of each shape.
    """

    amount: float
    costs: Costs

    def of(self, choice: Choice) -> float:
        """Return what a choice costs."""
        return sum(costs[shape] for costs, shape in zip(self.costs, choice, strict=True))


class Library:
    """Versions of a decoder's blocks, and the search among them.

    All versions are held in memory.

    Args:
        decoder: never edited.
        fitted: calibration text that versions are fitted to.
        windows: selection text. Harms are estimated and measured on its beginning.

    Attributes:
        whole: the choice that changes nothing.
        sizes: by block, the parameters of each shape.
    """

    def __init__(
        self, decoder: Decoder, fitted: TokenWindows, windows: TokenWindows, progress: Progress = SILENT
    ) -> None:
        self._decoder, self._windows, self._read = decoder, windows, beginning(windows, _READ)
        self.whole: Choice = tuple(Shape(*both) for both in zip(decoder.heads, decoder.d_ffn, strict=True))
        self._options = [_options(shape) for shape in self.whole]
        blocks = decoder.blocks
        self._stages = [_Stage(index, block.module) for index, block in enumerate(blocks)]
        self._places: dict[tuple[int, Shape, int], int] = {
            (index, shape, 1): index for index, shape in enumerate(self.whole)
        }
        self.sizes = [{GONE: 0} for _ in blocks]
        depth = decoder.n_blocks
        wanted = {
            index: [
                *((shape, 1) for shape in options if shape not in (GONE, self.whole[index])),
                *((self.whole[index], run) for run in _RUNS if index + run <= depth and self.whole[index] != GONE),
            ]
            for index, options in enumerate(self._options)
        }
        decoder.model.eval()
        for index, shape, length, version in walked(decoder, fitted, wanted, progress):
            self._places[index, shape, length] = len(self._stages)
            self._stages.append(_Stage(index, version.of(blocks[index])))
        for (index, shape, _), place in self._places.items():
            module = self._stages[place].module
            self.sizes[index][shape] = sum({id(each): each.numel() for each in module.parameters()}.values())
        self._known: dict[str, dict[Path, float]] = {}
        self._estimates: dict[Choice, list[dict[Shape, float]]] = {}

    def best(self, limit: Limit) -> Choice | None:
        """Return the best choice within a limit; None where there is none.

        What is left of the limit goes to one block's neurons, so that a number of them may be no version's.
        """
        found = {self._reduced(limit, steps) for steps in _STEPS} | {self.dropped(limit)}
        choices = sorted(each for each in found if each is not None)
        if not choices:
            return None
        return self._filled(min(zip(self.nats(choices, self._windows), choices, strict=True))[1], limit)

    def dropped(self, limit: Limit) -> Choice | None:
        """Return the best choice of whole blocks within a limit; None where there is none."""
        choice = self._solved(self._measured_harms(self.whole), limit, self.whole, len(self.whole))
        if choice is None:
            return None
        (now,) = self.nats([choice])
        for _ in range(_ROUNDS):
            harms = self._measured_harms(choice)
            solved = {self._solved(harms, limit, choice, most) for most in self._numbers()}
            others = sorted(each for each in solved if each is not None and each != choice)
            before, (now, choice) = now, min([(now, choice), *zip(self.nats(others), others, strict=True)])
            if now > before - _ENOUGH:
                break
        return choice

    def _reduced(self, limit: Limit, steps: int) -> Choice | None:
        """Reach a limit from the whole model, step by step."""
        choice, whole = self.whole, limit.of(self.whole)
        # The same steps for every limit, so that what was worked out for one serves the next.
        amounts = [each for each in (whole - whole * step / steps for step in range(1, steps)) if each > limit.amount]
        for amount in (*amounts, limit.amount):
            within = replace(limit, amount=amount)
            found = self._solved(self._estimated_harms(choice), within, choice, len(choice))
            if found is None:
                return None
            choice = found
        return choice

    def _filled(self, choice: Choice, limit: Limit) -> Choice:
        """Add as many neurons as a limit has room for to the block that gains most by them."""
        best, harms = (0.0, choice), self._estimated_harms(choice)
        for index, here in enumerate(choice):
            wider = [shape for shape in harms[index] if shape.heads == here.heads and shape.neurons > here.neurons > 0]
            if wider:
                shape = min(wider)
                more, cost = shape.neurons - here.neurons, limit.costs[index][shape] - limit.costs[index][here]
                spare = max(0, limit.amount - limit.of(choice))  # the solver may overstep a limit by rounding
                added = more if spare >= cost else int(spare * more // cost)
                gain = -harms[index][shape] * added / more
                grown = Shape(here.heads, here.neurons + added)
                best = max(best, (gain, (*choice[:index], grown, *choice[index + 1 :])))
        return best[1]

    def _numbers(self) -> list[int]:
        return sorted({max(1, round(each * len(self.whole) / 12)) for each in _CHANGES})

    def _measured_harms(self, choice: Choice) -> list[dict[Shape, float]]:
        """Return, by block, what dropping it, or having it back whole, would add to a choice's nats a token."""
        tried: dict[Choice, tuple[int, Shape]] = {}
        for index, (here, whole) in enumerate(zip(choice, self.whole, strict=True)):
            other = whole if here == GONE else GONE
            changed = (*choice[:index], other, *choice[index + 1 :])
            if any(each != GONE for each in changed):
                tried[changed] = index, other
        now, *each_nats = self.nats([choice, *tried])
        found: list[dict[Shape, float]] = [{shape: 0.0} for shape in choice]
        for (index, shape), nats in zip(tried.values(), each_nats, strict=True):
            if math.isfinite(nats):
                found[index][shape] = nats - now
        return found

    def _estimated_harms(self, choice: Choice) -> list[dict[Shape, float]]:
        """Return, by block, what each version in its place would add to a choice's nats a token: see `harms`."""
        if choice not in self._estimates:
            kept = [index for index, shape in enumerate(choice) if shape != GONE]
            places = dict(zip(kept, self._path(choice), strict=True))
            modules = [self._stages[places[index]].module if index in places else None for index in range(len(choice))]
            others: list[dict[Shape, nn.Module | None]] = [
                {
                    shape: None if shape == GONE else self._stages[self._places[index, shape, 1]].module
                    for shape in self._options[index]
                    if shape != here
                }
                for index, here in enumerate(choice)
            ]
            found = estimated(self._decoder, self._read, modules, others)
            self._estimates[choice] = [{here: 0.0, **each} for here, each in zip(choice, found, strict=True)]
        return self._estimates[choice]

    def _solved(
        self, harms: Sequence[Mapping[Shape, float]], limit: Limit, choice: Choice, changes: int
    ) -> Choice | None:
        """Return the choice of the least sum of harms within a limit that differs in at most `changes` blocks."""
        entries = [(index, shape, harm) for index, each in enumerate(harms) for shape, harm in each.items()]
        blocks = np.array([index for index, *_ in entries])
        if limit.amount <= 0:
            return None
        one_each = (np.arange(len(choice))[:, None] == blocks[None]).astype(float)
        costs = np.array([limit.costs[index][shape] for index, shape, _ in entries], dtype=float)
        kept = np.array([shape == choice[index] for index, shape, _ in entries], dtype=float)
        gone = np.array([shape == GONE for _, shape, _ in entries], dtype=float)
        taken = taken_least(
            np.array([harm for *_, harm in entries]),
            [
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(costs / limit.amount, -np.inf, 1),
                LinearConstraint(kept, len(choice) - changes, np.inf),
                LinearConstraint(gone, 0, len(choice) - 1),
            ],
        )
        if taken is None:
            return None
        chosen = [entry for entry, this in zip(entries, taken, strict=True) if this]
        return tuple(shape for _, shape, _ in sorted(chosen, key=lambda entry: entry[0]))

    def nats(self, choices: Sequence[Choice], windows: TokenWindows | None = None) -> list[float]:
        """Return the nats a token of choices, unrepaired, on the beginning of the selection text, or on other text."""
        windows = windows or self._read
        paths = {choice: tuple(self._path(choice)) for choice in choices}
        known = self._known.setdefault(windows.sha256, {})
        missing = sorted({path for path in paths.values() if path not in known})
        totals = dict.fromkeys(missing, 0.0)
        size = max(1, batch_tokens(self._decoder, self._decoder.n_blocks) // windows.context)
        starts = range(0, len(windows), size) if missing else range(0)
        with torch.no_grad(), fused_activations(self._decoder.model):
            for start in starts:
                batch = list(range(start, min(start + size, len(windows))))
                for path, nats in self._measured(windows, batch, missing):
                    totals[path] += nats
        tokens = float((windows.lengths - windows.first_scored).sum())
        known |= {path: total / tokens for path, total in totals.items()}
        return [known[paths[choice]] for choice in choices]

    def _measured(self, windows: TokenWindows, batch: list[int], paths: Iterable[Path]) -> Iterator[tuple[Path, float]]:
        ids, scored = windows.input_ids[batch], scored_positions(windows, batch)
        targets = ids[scored].to(self._decoder.device)
        stepper = Stepper(self._decoder)
        first = stepper.embed(ids)

        def step(place: int, hidden: Tensor) -> Tensor:
            stage = self._stages[place]
            stepper.replace(stage.index, stage.module)
            with self._decoder.resident([stage.index]):
                return stepper.step(stage.index, hidden)

        for path, hidden in walk(paths, first, step):
            final = self._decoder.readout(taken(hidden, predicting(scored)))
            nats = log_partition(self._decoder, final) - target_logits(self._decoder, final, targets)
            found = float(nats.sum(dtype=torch.float64))
            yield path, found if math.isfinite(found) else math.inf

    def _path(self, choice: Choice) -> Iterator[int]:
        kept = [index for index, shape in enumerate(choice) if shape != GONE]
        for index, after in pairwise([*kept, len(choice)]):
            shape = choice[index]
            fitting = (length for length in range(after - index, 0, -1) if (index, shape, length) in self._places)
            yield self._places[index, shape, next(fitting)]


def _options(whole: Shape) -> list[Shape]:
    """Return what a block may keep, the most first."""
    heads = {whole.heads, *(round(share * whole.heads) for share in _HEADS)}
    neurons = {whole.neurons, *(round(share * whole.neurons) for share in _NEURONS)}
    return [Shape(each, some) for each in sorted(heads, reverse=True) for some in sorted(neurons, reverse=True)]
