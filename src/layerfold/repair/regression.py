"""Residuals of blocks against their targets, and the moments that regressing them needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from layerfold.errors import ModelError
from layerfold.inference.holding import parts, weights
from layerfold.inference.spool import Spool
from layerfold.inference.streaming import Stream, taken
from layerfold.maths.precision import widest
from layerfold.maths.ridge import NOT_FINITE, HeldOut, RegressionMoments
from layerfold.model.matrix import watching
from layerfold.model.outputs import Output

Problem = Mapping[int, tuple[Output, ...]]
"""The matrices that are fitted at once, by block: its output matrices; of several blocks where they share weights."""


@dataclass(frozen=True)
class Error:
    """Error of a block against its target: on all windows, and on those held out.

    It is the mean over the tokens of |residual|^2 / |target|^2. Each token counts the same, however large its state:
    a norm comes before whatever reads it.
    """

    all: float
    held_out: float

    def __le__(self, other: Error) -> bool:
        return self.all <= other.all and self.held_out <= other.held_out


@dataclass(frozen=True)
class Residuals:
    """Residuals of blocks against their targets.

    Attributes:
        errors: by block.
        moments: of the regression at hand, over the windows that are fitted to and over those held out.
        states: outputs of the last block.
    """

    errors: dict[int, Error]
    moments: tuple[RegressionMoments, HeldOut] | None
    states: Spool

    @property
    def error(self) -> Error:
        """The sum over the blocks."""
        each = self.errors.values()
        return Error(sum(error.all for error in each), sum(error.held_out for error in each))

    def without_moments(self) -> Residuals:
        """Return the rest, so that the moments of one pass are held at a time."""
        return replace(self, moments=None)


def residuals(stream: Stream, held_out: Tensor, targets: Mapping[int, Spool], problem: Problem) -> Residuals:
    """Pass the text through the blocks that have a target, and measure their residuals."""
    moments = RegressionMoments(), HeldOut()
    # Weighted sums of squares of what is missed of the targets, and of the targets: to fit, and held out.
    device = stream.stepper.decoder.device
    sums = {index: torch.zeros(2, 2, dtype=widest(device), device=device) for index in targets}
    states = stream.spool()
    with watching(each for some in problem.values() for each in some) as seen:
        for batch, index, hidden in stream.walk(targets):
            should = targets[index][batch]
            for place, rows in enumerate(parts(stream, held_out, batch)):
                wanted = taken(should, rows).float()
                missed, counts = wanted - taken(hidden, rows), weights(wanted)
                for which, rest in enumerate((missed, wanted)):
                    total = sums[index]
                    total[which, place] += counts.to(total.dtype) @ rest.square().sum(1, dtype=total.dtype)
                if index in problem and len(missed):
                    read = [each.features(taken(seen[each], rows)) for each in problem[index]]
                    moments[place].update(torch.cat(read, dim=1), problem[index][-1].before(missed), counts)
            seen.clear()
            if index == max(targets):
                states[batch] = hidden
    errors = {}
    for index, (missed, should) in sums.items():
        if not (missed + should).isfinite().all():
            raise ModelError(NOT_FINITE)
        should.clamp_min_(torch.finfo(torch.float32).tiny)
        errors[index] = Error(float(missed.sum() / should.sum()), float(missed[1] / should[1]))
    return Residuals(errors, moments, states)
