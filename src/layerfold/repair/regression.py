"""Residuals of blocks against their targets, and the moments that regressing them needs."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from layerfold.errors import InputError, ModelError
from layerfold.inference.spool import Spool
from layerfold.inference.streaming import Stream, taken
from layerfold.maths.precision import widest
from layerfold.maths.ridge import NOT_FINITE, HeldOut, RegressionMoments
from layerfold.model.decoder import Decoder
from layerfold.model.matrix import Matrix, watching
from layerfold.text.windows import TokenWindows

HELD_OUT = 8
"""Every 8th window is held out: those windows choose the ridges, and whether a fit is kept."""

WINDOWS = 16
"""Windows are cut in halves until there are this many."""

SHORTEST = 128
"""But not below this length, in tokens."""

FLOOR = 1e-6
"""Smallest mean square of a state; norms add about as much before they divide."""


class Output(Matrix):
    """A matrix by which a sublayer writes into the residual stream, and what becomes of its output on the way.

    Args:
        scale: what the output is multiplied by.
        norm: a norm of the output, before it is added; None where there is none.

    Where there is a norm, y = g z / |z| for the output z, the change of y for a small change of z is taken for that at
    the same |z|.
    """

    def __init__(self, module: nn.Module, scale: float = 1.0, norm: nn.Module | None = None) -> None:
        super().__init__(module)
        self._scale, self._norm = scale, norm

    @property
    def normed(self) -> bool:
        """Whether there is a norm."""
        return self._norm is not None

    @property
    def constant(self) -> bool:
        """Whether a bias can be fitted too."""
        return self.bias is not None and self._norm is None

    def features(self, inputs: Tensor) -> Tensor:
        """Return what a change of `weight` multiplies on its way into the residual stream, (..., in)."""
        found = super().features(inputs)
        if self._norm is not None:
            output = self.module.forward(inputs).float()  # without the hooks that watch it
            found = found * (output.square().mean(-1, keepdim=True) + FLOOR).rsqrt()
        return found if self._scale == 1 else found * self._scale

    def before(self, missed: Tensor) -> Tensor:
        """Return what the norm's input misses, for what the residual stream misses, (..., d_model)."""
        if self._norm is None:
            return missed
        gains = self._norm(missed.new_ones(1, missed.shape[-1], dtype=self.weight.dtype))[0].float()
        seen = gains.abs() > FLOOR * gains.abs().max()  # a channel of gain 0 writes nothing
        return torch.where(seen, missed / torch.where(seen, gains, 1.0), 0.0)

    def add_(self, weight: Tensor, bias: Tensor | None, share: float = 1.0) -> None:
        """Add a change to the weight, and to the bias where one was fitted."""
        self.weight.add_(weight, alpha=share)
        if bias is not None and (own := self.bias) is not None:
            own.add_(bias, alpha=share / self._scale)


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


def refittable(decoder: Decoder, index: int, part: str) -> Output | None:
    """Return the matrix of a block's ``attention`` or ``ffn`` that a repair refits; None where that part was removed.

    Raises:
        InputError: it holds pruned weights, whose zeros are to stay, or norms follow the residual stream.
    """
    block, family = decoder.blocks[index], decoder.family
    found = block.output(part)
    if family.stream_norms:
        raise InputError(
            f"repair of a {decoder.model.config.model_type} whose norms are of the residual stream itself: what leaves "
            "a block is not linear in its weights; accepted: none"
        )
    if found is not None and found.holds_zeros:
        raise InputError(
            "a repair refits whole matrices, and would fill zeros that are to stay; accepted: neurons, where "
            "weights are pruned"
        )
    after = family.ffn_after if part == "ffn" else family.attention_after
    norm = operator.attrgetter(after)(block.module) if found is not None and after else None
    return None if found is None else Output(found.module, decoder.configured.residual_scale, norm)


def halved(windows: TokenWindows) -> TokenWindows:
    """Cut windows in halves until there are `WINDOWS`, but none shorter than `SHORTEST` tokens.

    Little text then still has several windows to hold out, and several first tokens, whose states are like no others.
    """
    while len(windows) < WINDOWS and windows.context % 2 == 0 and windows.context >= 2 * SHORTEST:
        context = windows.context // 2
        lengths = torch.stack([windows.lengths, windows.lengths - context], dim=1).clamp(0, context).flatten()
        filled = lengths > 0
        windows = replace(
            windows,
            input_ids=windows.input_ids.reshape(-1, context)[filled],
            lengths=lengths[filled],
            first_scored=torch.ones_like(lengths[filled]),
            context=context,
            stride=context,
        )
    return windows


def weights(targets: Tensor) -> Tensor:
    """Return the weight of each row, (rows,), for targets, (rows, d): the inverse of its mean square."""
    return 1 / (targets.float().square().mean(1) + FLOOR)


def held_out_windows(windows: TokenWindows) -> Tensor:
    """Mark the held-out windows, (windows,): every 8th, or the last where there are fewer.

    Raises:
        InputError: there is only one.
    """
    if len(windows) < 2:
        raise InputError(
            "calibration text of 1 window; accepted: 2 or more, as a repair is not fitted to all that it is judged by"
        )
    every = min(HELD_OUT, len(windows))
    return torch.arange(len(windows)) % every == every - 1


def parts(stream: Stream, held_out: Tensor, batch: slice) -> tuple[Tensor, Tensor]:
    """Mark the positions of a batch that hold text, (windows, tokens): to fit, and held out."""
    real, apart = stream.holds_text(batch), held_out[batch][:, None]
    return real & ~apart, real & apart


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
