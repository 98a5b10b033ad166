"""Least squares on what blocks write into the residual stream, so that each imitates the original."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from layerfold.inference.holding import halved, held_out_windows
from layerfold.inference.stepping import Stepper, fused_activations
from layerfold.inference.streaming import Stream
from layerfold.maths.ridge import Fit, ridge_fit
from layerfold.model.decoder import Decoder
from layerfold.model.matrix import Matrix, part_
from layerfold.model.outputs import Output, refittable
from layerfold.progress import SILENT, Progress
from layerfold.repair.regression import Error, Problem, Residuals, residuals
from layerfold.text.windows import TokenWindows

_EXACT = 1e-10
"""Relative error below which a block differs from its target by rounding alone."""


@dataclass(frozen=True)
class Repaired:
    """What a repair did to a block.

    Attributes:
        block: its index.
        before, after: error against its target, on the inputs that the repaired model gives it.
        ridges: penalties of the fits that were kept, by what was fitted.
        singular: whether such a fit had fewer rows than inputs, or inputs that the smallest ridge did not regularise.
        idle: number of inputs that were always zero.
    """

    block: int
    before: Error
    after: Error
    ridges: Mapping[str, float]
    singular: bool
    idle: int


@torch.no_grad()
def refit_(
    decoder: Decoder,
    original: Decoder,
    cuts: Sequence[int],
    windows: TokenWindows,
    *,
    attention: bool = False,
    progress: Progress = SILENT,
) -> list[Repaired]:
    """Refit what each block writes into the residual stream, front to back, against the model that it was made from.

    The target of a block is the original's hidden state where the block's output is read. The residual, on the inputs
    that the block gets in the edited model, is regressed on the inputs of its FFN's last matrix. With `attention` it is
    regressed on the inputs of its attention's last matrix too; that changes the FFN's inputs, so the FFN is fitted once
    more. An FFN that several blocks share is fitted to the residuals of all of them. No block's error rises: a fit that
    raises it, on the held-out windows or on all, is undone. For blocks that share an FFN, and those between them, the
    sum of the errors does not rise.

    The states of both models are in temporary files. The moments of one block and one batch are in memory.

    Args:
        decoder: is edited in place.
        original: stays as it is, also where the decoder uses its parameters.
        cuts: for each block of the decoder, the index of the original's block whose input is its target; the number of
            the original's blocks where the target is the final norm's input. Never decreasing.
        windows: calibration text. Every 8th window is held out.
        attention: whether attentions are refitted too.

    Raises:
        InputError: text of a single window, or pruned weights, whose zeros are to stay.
        ModelError: activations that are not finite.
    """
    blocks = range(decoder.n_blocks)
    ffns = [refittable(decoder, index, "ffn") for index in blocks]
    attentions = [refittable(decoder, index, "attention") if attention else None for index in blocks]
    part_((matrix for matrix in (*ffns, *attentions) if matrix is not None), original.model)
    windows = halved(windows)
    held_out = held_out_windows(windows)
    found: list[Repaired] = []
    with fused_activations(decoder.model), fused_activations(original.model):
        stream, teacher = Stream(Stepper(decoder), windows), Stream(Stepper(original), windows)
        reached = 0
        tied = decoder.blocks_by_ffn
        units = list(_units(decoder.n_blocks, tied))
        for unit in progress.track(units, "repairing, block", len(units)):
            targets = {}
            for index in unit:
                targets[index] = teacher.states = teacher.passed(range(reached, cuts[index]))
                reached = cuts[index]
            with decoder.resident(unit, edited=True):
                last, repaired = _repair(partial(residuals, stream, held_out, targets), unit, tied, ffns, attentions)
            stream.states = last.states
            found += repaired
    return found


def _units(n_blocks: int, tied: Iterable[Sequence[int]]) -> Iterator[range]:
    """Yield the runs of blocks that are repaired together: from the first to the last block that shares an FFN."""
    last = {index: blocks[-1] for blocks in tied for index in blocks}
    start = end = 0
    for index in range(n_blocks):
        end = max(end, last.get(index, index))
        if index == end:
            yield range(start, index + 1)
            start = end = index + 1


Measure = Callable[[Problem], Residuals]
"""Measures the residuals of a unit of blocks, and collects moments for a problem."""

Fits = list[tuple[Problem, Fit]]
"""The fits that were kept."""


def _repair(
    measure: Measure,
    unit: range,
    tied: Iterable[Sequence[int]],
    ffns: Sequence[Output | None],
    attentions: Sequence[Output | None],
) -> tuple[Residuals, Iterator[Repaired]]:
    """Repair a unit of blocks; return the last residuals, and what was done to each block."""
    ffn, attention = ffns[unit[0]], attentions[unit[0]]
    if len(unit) == 1 and ffn is not None and attention is not None and not (ffn.normed or attention.normed):
        first, last, fits = _jointly(measure, unit[0], attention, ffn)
    else:
        own = [{index: (found,)} for index in unit if (found := attentions[index]) is not None]
        shared = [
            {index: (found,) for index in blocks if (found := ffns[index]) is not None}
            for blocks in tied
            if blocks[0] in unit
        ]
        # FFNs once more where attentions have changed what they read.
        first, last, fits = _in_turn(measure, [*shared, *own, *(shared if own else ())])

    def repaired() -> Iterator[Repaired]:
        for index in unit:
            kept = [(problem[index], fit) for problem, fit in fits if index in problem and fit.weight is not None]
            yield Repaired(
                index,
                first.errors[index],
                last.errors[index],
                ridges={
                    " and ".join("attention" if each is attentions[index] else "ffn" for each in matrices): fit.ridge
                    for matrices, fit in kept
                },
                singular=any(fit.singular for _, fit in kept),
                idle=max((fit.idle for _, fit in kept), default=0),
            )

    return last, repaired()


def _jointly(measure: Measure, index: int, attention: Output, ffn: Output) -> tuple[Residuals, Residuals, Fits]:
    """Fit a block's attention and FFN jointly, then the FFN to the residual; or the FFN alone where that does better.

    One after the other does worse: each makes up for part of the other's error, so that neither gains much.
    """
    both, alone = (attention, ffn), (ffn,)
    first = measure({index: both})
    if first.error.all <= _EXACT:
        first = first.without_moments()
        return first, first, []
    were = values(both)
    joint, only = _fit(first, both, consume=False), _fit(first, alone, last=ffn.weight.shape[1])
    first = first.without_moments()
    fits: Fits = [({index: alone}, only)]
    add_(both, joint)
    rest = _fit(measure({index: alone}), alone)
    if rest.after < only.after:
        fits = [({index: both}, joint), ({index: alone}, rest)]
    else:
        restore_(both, were)
    add_(alone, fits[-1][1])
    last = measure({})
    if not last.error <= first.error:
        restore_(both, were)
        last, fits = measure({}), []
    return first, last.without_moments(), fits


def _in_turn(measure: Measure, problems: Sequence[Problem]) -> tuple[Residuals, Residuals, Fits]:
    """Fit one problem after the other."""
    turns: list[Problem] = [*problems, {}]
    last = measure(turns[0])
    first = last.without_moments()
    fits: Fits = []
    for problem, following in pairwise(turns):
        if last.error.all <= _EXACT:
            break
        matrices = next(iter(problem.values()))
        fit, were = _fit(last, matrices), values(matrices)
        before, last = last.error, last.without_moments()
        # Where blocks share what is fitted, each changes what the next one reads: a shorter step may do.
        for share in (1.0, 0.5, 0.25) if len(problem) > 1 else (1.0,):
            add_(matrices, fit, share)
            last = measure(following)
            if last.error <= before:
                fits.append((problem, fit))
                break
            restore_(matrices, were)
        else:
            last = measure(following)
    return first, last.without_moments(), fits  # which the next block's would be held beside


def _fit(found: Residuals, matrices: Sequence[Output], last: int | None = None, *, consume: bool = True) -> Fit:
    assert found.moments is not None
    return ridge_fit(*found.moments, constant=matrices[-1].constant, last=last, consume=consume)


def add_(matrices: Sequence[Output], fit: Fit, share: float = 1.0) -> None:
    """Add a change to weights, and to the last one's bias."""
    if fit.weight is None:
        return
    widths = [each.weight.shape[1] for each in matrices]
    for each, change in zip(matrices, fit.weight.split(widths, dim=1), strict=True):
        each.add_(change, fit.bias if each is matrices[-1] else None, share)


def values(matrices: Sequence[Matrix]) -> list[Tensor]:
    """Return copies of weights and biases."""
    return [tensor.clone() for each in matrices for tensor in each.tensors]


def restore_(matrices: Sequence[Matrix], were: Sequence[Tensor]) -> None:
    """Give weights and biases the values that they had."""
    for tensor, value in zip((tensor for each in matrices for tensor in each.tensors), were, strict=True):
        tensor.copy_(value)
