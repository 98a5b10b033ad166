"""Blocks refitted to replace the blocks after them, which a candidate of a search lacks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from layerfold.inference.holding import halved, held_out_windows, parts, weights
from layerfold.inference.spool import Spool
from layerfold.inference.stepping import Stepper, fused_activations
from layerfold.inference.streaming import Stream, taken
from layerfold.maths.ridge import HeldOut, RegressionMoments, ridge_fits
from layerfold.model.block import PARTS
from layerfold.model.decoder import Decoder
from layerfold.model.matrix import watching
from layerfold.model.outputs import Output, refittable
from layerfold.progress import SILENT, Progress
from layerfold.repair.refit import add_, restore_, values
from layerfold.text.windows import TokenWindows


@torch.no_grad()
def spanning(
    decoder: Decoder,
    windows: TokenWindows,
    lengths: Iterable[int],
    *,
    attention: bool = True,
    progress: Progress = SILENT,
) -> dict[int, Decoder]:
    """Refit every block, on its own inputs, to the input of each of the blocks that follow it.

    `refit_` does the same on the inputs that the edited model gives, so that a block also makes up for the errors of
    the blocks before it. Here a block's moments serve all candidates instead: the repair of a set of kept blocks picks,
    for each block, the version that leads to the next one.

    Args:
        decoder: stays as it is.
        windows: calibration text.
        lengths: lengths of the runs that one block replaces, itself included; 2 or more. Runs longer than the decoder
            are left out.
        attention: whether attentions are refitted too.

    Returns:
        For each length, a decoder of the same depth whose every block replaces a run of that length. The last blocks,
        which no such run begins with, are unchanged. All but the refitted matrices are the given decoder's own.
    """
    n_blocks = decoder.n_blocks
    found = {length: decoder.copy(share=True) for length in sorted(lengths) if length <= n_blocks}
    if not found:
        return {}
    windows = halved(windows)
    held_out = held_out_windows(windows)
    with ExitStack() as stack:
        for each in (decoder, *found.values()):
            stack.enter_context(fused_activations(each.model))
        stream = Stream(Stepper(decoder), windows)
        others = {length: stream.stepper.like(each) for length, each in found.items()}
        ahead = deque([stream.states])  # what enters the block at hand, and those after it
        for index in progress.track(range(n_blocks - 1), "refitting, block", n_blocks - 1):
            while len(ahead) <= max(found) and index + len(ahead) <= n_blocks:
                stream.states = ahead[-1]
                ahead.append(stream.passed([index + len(ahead) - 1]))
            stream.states = ahead[0]
            targets = {length: ahead[length] for length in found if length < len(ahead)}
            with ExitStack() as here:
                for each in (decoder, *(found[length] for length in targets)):
                    here.enter_context(each.resident([index], edited=each is not decoder))
                own_states, own = ahead[1], {length: others[length] for length in targets}
                _span(stream, own, index, targets, own_states, held_out, attention)
            ahead.popleft()
    return found


def _span(
    stream: Stream,
    others: Mapping[int, Stepper],
    index: int,
    targets: Mapping[int, Spool],
    own_states: Spool,
    held_out: Tensor,
    attention: bool,
) -> None:
    """Refit one block for each of some targets, each in a decoder of its own.

    Args:
        stream: of the model as it is, before the block.
        others: of the decoders, by the length of the run that the block replaces; and so are the targets.
        own_states: outputs of the unchanged block. They weigh the rows for all targets, which share their moments.
    """
    own = {length: _matrices(other.decoder, index, attention) for length, other in others.items()}
    matrices = _matrices(stream.stepper.decoder, index, attention)
    if not matrices or not targets:
        return
    for each in (each for some in own.values() for each in some):
        each.own_()
    ffn = matrices[-1:]
    moments = _moments(stream, stream.stepper, index, matrices, list(targets.values()), own_states, held_out)
    constant, count = ffn[0].constant, len(targets)
    only = ridge_fits(*moments, constant=constant, targets=count, last=ffn[0].weight.shape[1])
    joint = ridge_fits(*moments, constant=constant, targets=count) if len(matrices) > 1 else [None] * count
    del moments
    for (length, target), alone, both in zip(targets.items(), only, joint, strict=True):
        mine = own[length]
        if both is not None:
            were = values(mine)
            add_(mine, both)
            (rest,) = ridge_fits(
                *_moments(stream, others[length], index, mine[-1:], [target], own_states, held_out), constant=constant
            )
            if rest.after < alone.after:
                add_(mine[-1:], rest)
                continue
            restore_(mine, were)
        add_(mine[-1:], alone)


def _matrices(decoder: Decoder, index: int, attention: bool) -> list[Output]:
    found = [refittable(decoder, index, part) for part in (PARTS if attention else ("ffn",))]
    there = [each for each in found if each is not None]
    # Outputs with a norm of their own are not fitted jointly.
    return there[-1:] if any(each.normed for each in there) else there


def _moments(
    stream: Stream,
    stepper: Stepper,
    index: int,
    matrices: Sequence[Output],
    targets: Sequence[Spool],
    own: Spool,
    held_out: Tensor,
) -> tuple[RegressionMoments, HeldOut]:
    """Moments of the inputs of a block's matrices and of its residuals against each target, side by side."""
    moments = RegressionMoments(), HeldOut()
    with watching(matrices) as seen:
        for batch, _, hidden in stream.walk([index], stepper):
            for place, rows in enumerate(parts(stream, held_out, batch)):
                if rows.any():
                    read = torch.cat([each.features(taken(seen[each], rows)) for each in matrices], dim=1)
                    left = taken(hidden, rows).float()
                    each_missed = [matrices[-1].before(taken(target[batch], rows) - left) for target in targets]
                    missed = torch.cat(each_missed, dim=1)
                    moments[place].update(read, missed, weights(taken(own[batch], rows)))
            seen.clear()
    return moments
