"""The library of a plan: versions of each block with fewer heads and neurons, and which of them to take.

Each version is fitted once, in closed form, to the original's own hidden states (see `methods.thin`). A choice is one
shape for each block. What a choice comes to, unrepaired, is measured on selection text by passing through the versions.
What a change of one block would come to is measured beside a choice. An integer programme then picks, of all changes
together, those within the budget with the least sum of harms. Harms do not add up over many changes. So it is solved
for several numbers of changed blocks, the best result is the next choice, and everything is measured again beside that.

Source: Bercovich et al., "Puzzle: Distillation-Based NAS for Inference-Optimized LLMs", 2024, section 4, for a library
of blocks and an integer programme; Kurtic et al., "ZipLM", 2023, for a structured search by measured harm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn

from layerfold.inference.scoring import log_partition, predicting, scored_positions, target_logits
from layerfold.inference.stepping import Stepper, fused_activations
from layerfold.inference.streaming import batch_tokens, taken
from layerfold.methods.thin.versions import Shape, walked
from layerfold.model.decoder import Decoder
from layerfold.progress import SILENT, Progress
from layerfold.search.stages import Path, walk
from layerfold.text.windows import TokenWindows

Choice = tuple[Shape, ...]
"""What each block keeps."""

Options = Sequence[Sequence[Shape]]
"""What each block may keep."""

GONE = Shape(0, 0)

_NEURONS = (0.75, 0.5, 1 / 3, 1 / 6, 1 / 12, 0.0)
"""Shares of its neurons that an FFN may keep, beside all of them."""

_HEADS = (2 / 3, 1 / 3, 0.0)
"""Shares of its groups of heads that an attention may keep, beside all of them."""

_RUNS = (2, 3)
"""Lengths of runs of blocks that a whole block is fitted to replace, itself included."""

_STEPS = 8
"""The size falls by an eighth of the blocks' at a time."""

_ROUNDS = 20
_ENOUGH = 0.003
"""A gain, in nats a token, below which no further round follows."""

_CHANGES = (8, 6, 4, 3, 2, 1)
"""Numbers of blocks that may change in one round, of twelve; of more in proportion."""


@dataclass(frozen=True)
class _Stage:
    """A block as it is passed through: its index, and what takes its place."""

    index: int
    module: nn.Module


class Library:
    """Versions of a decoder's blocks, and the search among them.

    All versions are held in memory.

    Args:
        decoder: never edited.
        fitted: calibration text that versions are fitted to.
        windows: selection text.
    """

    def __init__(
        self, decoder: Decoder, fitted: TokenWindows, windows: TokenWindows, progress: Progress = SILENT
    ) -> None:
        self._decoder, self._windows, self._progress = decoder, windows, progress
        self.whole: Choice = tuple(Shape(*both) for both in zip(decoder.heads, decoder.d_ffn, strict=True))
        self._options = [_options(shape) for shape in self.whole]
        blocks = decoder.blocks
        self._stages = [_Stage(index, block.module) for index, block in enumerate(blocks)]
        self._places: dict[tuple[int, Shape, int], int] = {
            (index, shape, 1): index for index, shape in enumerate(self.whole)
        }
        self._sizes = [{GONE: 0} for _ in blocks]
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
            self._sizes[index][shape] = sum({id(each): each.numel() for each in module.parameters()}.values())
        self._known: dict[Path, float] = {}

    def size(self, choice: Choice) -> int:
        """Count the parameters of a choice's blocks."""
        return sum(sizes[shape] for sizes, shape in zip(self._sizes, choice, strict=True))

    def best(self, limit: int, *, parts: bool = True) -> Choice | None:
        """Return the best choice whose blocks hold at most so many parameters; None where there is none.

        It is no worse than what comes of whole blocks alone.

        Args:
            parts: let blocks keep some of their heads and neurons; otherwise each stays whole or goes.
        """
        options = self._options if parts else [[shape, GONE] for shape in self.whole]
        starts = [self._reduced(limit, options), self.best(limit, parts=False) if parts else None]
        found = [each for each in starts if each is not None]
        return self._refined(min(zip(self.nats(found), found, strict=True))[1], limit, options) if found else None

    def _reduced(self, limit: int, options: Options) -> Choice | None:
        """Reach a limit from the whole model, step by step."""
        choice, whole = self.whole, self.size(self.whole)
        # The same steps for every limit, so that what was measured for one serves the next.
        sizes = (whole - whole * step // _STEPS for step in range(1, _STEPS))
        for size in (*(size for size in sizes if size > limit), limit):
            found = self._solved(self._harms(choice, options), size, choice, len(choice))
            if found is None:
                return None
            choice = found
        return choice

    def _refined(self, choice: Choice, limit: int, options: Options) -> Choice:
        """Change a choice for as long as that helps."""
        (now,) = self.nats([choice])
        for _ in range(_ROUNDS):
            harms = self._harms(choice, options)
            solved = {self._solved(harms, limit, choice, most) for most in self._numbers()}
            solved |= {self._solved(_measured(harms, choice), limit, choice, 1)}
            others = sorted(each for each in solved if each is not None and each != choice)
            before, (now, choice) = now, min([(now, choice), *zip(self.nats(others), others, strict=True)])
            if now > before - _ENOUGH:
                break
        return choice

    def _numbers(self) -> list[int]:
        return sorted({max(1, round(each * len(self.whole) / 12)) for each in _CHANGES})

    def _harms(self, choice: Choice, options: Options) -> list[dict[Shape, float]]:
        """Return, by block, what each of some shapes in its place would add to a choice's nats a token.

        The heads of each block are changed, and its neurons; of both together the sum is taken.
        """
        tried: dict[Choice, tuple[int, Shape]] = {}
        for index, here in enumerate(choice):
            for shape in options[index]:
                if _near(shape, here):
                    changed = (*choice[:index], shape, *choice[index + 1 :])
                    if shape != here and any(each != GONE for each in changed):
                        tried[changed] = index, shape
        now, *each_nats = self.nats([choice, *tried])
        found: list[dict[Shape, float]] = [{shape: 0.0} for shape in choice]
        for (index, shape), nats in zip(tried.values(), each_nats, strict=True):
            if math.isfinite(nats):
                found[index][shape] = nats - now
        for index, here in enumerate(choice):
            for shape in options[index]:
                if shape not in found[index]:
                    heads, neurons = Shape(shape.heads, here.neurons), Shape(here.heads, shape.neurons)
                    if heads in found[index] and neurons in found[index]:
                        found[index][shape] = found[index][heads] + found[index][neurons]
        return found

    def _solved(
        self, harms: Sequence[Mapping[Shape, float]], limit: int, choice: Choice, changes: int
    ) -> Choice | None:
        """Return the choice of the least sum of harms within a limit that differs in so many blocks at most."""
        entries = [(index, shape, harm) for index, each in enumerate(harms) for shape, harm in each.items()]
        blocks = np.array([index for index, *_ in entries])
        if limit <= 0:
            return None
        one_each = (np.arange(len(choice))[:, None] == blocks[None]).astype(float)
        sizes = np.array([self._sizes[index][shape] for index, shape, _ in entries], dtype=float)
        kept = np.array([shape == choice[index] for index, shape, _ in entries], dtype=float)
        gone = np.array([shape == GONE for _, shape, _ in entries], dtype=float)
        found = milp(
            np.array([harm for *_, harm in entries]),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(sizes / limit, -np.inf, 1),
                LinearConstraint(kept, len(choice) - changes, np.inf),
                LinearConstraint(gone, 0, len(choice) - 1),
            ],
            integrality=np.ones(len(entries)),
            bounds=Bounds(0, 1),
        )
        if found.x is None:
            return None
        chosen = [entry for entry, taken in zip(entries, found.x, strict=True) if taken > 0.5]
        return tuple(shape for _, shape, _ in sorted(chosen, key=lambda entry: entry[0]))

    def nats(self, choices: Sequence[Choice]) -> list[float]:
        """Return the nats a token of choices, unrepaired, on the selection text."""
        paths = {choice: tuple(self._path(choice)) for choice in choices}
        missing = sorted({path for path in paths.values() if path not in self._known})
        totals = dict.fromkeys(missing, 0.0)
        size = max(1, batch_tokens(self._decoder, self._decoder.n_blocks) // self._windows.context)
        starts = range(0, len(self._windows), size) if missing else range(0)
        with torch.no_grad(), fused_activations(self._decoder.model):
            for start in starts:
                batch = range(start, min(start + size, len(self._windows)))
                for path, nats in self._measured(list(batch), missing):
                    totals[path] += nats
        tokens = float((self._windows.lengths - self._windows.first_scored).sum())
        self._known |= {path: total / tokens for path, total in totals.items()}
        return [self._known[paths[choice]] for choice in choices]

    def _measured(self, batch: list[int], paths: Iterable[Path]) -> Iterator[tuple[Path, float]]:
        ids, scored = self._windows.input_ids[batch], scored_positions(self._windows, batch)
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


def _near(shape: Shape, here: Shape) -> bool:
    """Whether a shape is measured beside another."""
    return shape == GONE or shape.heads == here.heads or shape.neurons == here.neurons


def _measured(harms: Sequence[Mapping[Shape, float]], choice: Choice) -> list[dict[Shape, float]]:
    """Leave out the harms that are sums."""
    return [
        {shape: harm for shape, harm in each.items() if _near(shape, here)}
        for each, here in zip(harms, choice, strict=True)
    ]


def _options(whole: Shape) -> list[Shape]:
    """Return what a block may keep, the most first."""
    heads = {whole.heads, *(round(share * whole.heads) for share in _HEADS)}
    neurons = {whole.neurons, *(round(share * whole.neurons) for share in _NEURONS)}
    return [Shape(each, some) for each in sorted(heads, reverse=True) for some in sorted(neurons, reverse=True)]
