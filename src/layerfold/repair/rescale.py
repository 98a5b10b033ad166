"""Restoring the statistics of the inputs of an FFN's neurons, which averaging weights shrinks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerfold.errors import ModelError
from layerfold.inference.stepping import Stepper, fused_activations
from layerfold.inference.streaming import Stream
from layerfold.maths.linalg import Match
from layerfold.maths.moments import SecondMoments
from layerfold.maths.ridge import NOT_FINITE
from layerfold.model.decoder import Decoder
from layerfold.model.ffn import FFN
from layerfold.model.matrix import part_, watching
from layerfold.progress import SILENT, Progress
from layerfold.text.windows import TokenWindows

Sources = Mapping[int, Sequence[tuple[int, Match | None]]]
"""For a block, the blocks of the original that its FFN replaces, each with the match of its neurons."""


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of each neuron's inputs, (matrices, d_ffn) each: from `up`, and from `gate`."""

    mean: Tensor
    deviation: Tensor


@dataclass(frozen=True)
class Rescaled:
    """What a rescaling did to a block.

    Attributes:
        block: its index.
        shrunk: the deviation that its neurons' inputs had, as a share of what it is now, mean over the neurons.
    """

    block: int
    shrunk: float


@torch.no_grad()
def rescale_(
    decoder: Decoder, original: Decoder, sources: Sources, windows: TokenWindows, progress: Progress = SILENT
) -> list[Rescaled]:
    """Restore the mean and the deviation that each neuron's input has in the original.

    The rows of the FFNs' first matrices are scaled, and their biases, where they have any, shifted: front to back, on
    the inputs that the edited model gives them. A neuron that replaces several gets the mean of theirs, and so does an
    FFN that several blocks share. A neuron whose input is constant is not scaled.

    Args:
        decoder: is edited in place.
        original: stays as it is, also where the decoder uses its parameters.
        sources: the blocks to rescale.
        windows: calibration text.

    Raises:
        ModelError: activations that are not finite.

    Source: Jordan et al., "REPAIR: REnormalizing Permuted Activations for Interpolation Repair", 2022, section 3.
    """
    wanted = sorted({source for each in sources.values() for source, _ in each})
    tied = sorted(here for blocks in decoder.blocks_by_ffn if (here := [each for each in blocks if each in sources]))
    found = []
    blocks_of = decoder.blocks
    part_((matrix for index in sources for matrix in blocks_of[index].ffn.matrices), original.model)
    with fused_activations(decoder.model), fused_activations(original.model):
        spreads = _spreads(Stream(Stepper(original), windows), 0, wanted)
        stream, reached = Stream(Stepper(decoder), windows), 0
        for blocks in progress.track(tied, "rescaling, block", len(tied)):
            stream.advance(range(reached, blocks[0]))
            reached = blocks[0]
            now = _average([(each, None) for each in _spreads(stream, reached, blocks).values()])
            should = _average([(spreads[source], match) for index in blocks for source, match in sources[index]])
            with decoder.resident([blocks[0]], edited=True):
                ratio = _set(decoder.blocks[blocks[0]].ffn, now, should)
            found += [Rescaled(index, ratio) for index in blocks]
    return sorted(found, key=lambda each: each.block)


def _spreads(stream: Stream, first: int, blocks: Sequence[int]) -> dict[int, Spread]:
    """Pass the text on from the next block, and measure the inputs of some blocks' neurons."""
    every = stream.stepper.decoder.blocks
    ffns = {index: every[index].ffn for index in blocks}
    moments = {index: [SecondMoments(whole=False) for _ in ffn.matrices[:-1]] for index, ffn in ffns.items()}
    with watching((each for ffn in ffns.values() for each in ffn.matrices[:-1]), outputs=True) as given:
        for batch, index, _ in stream.walk(range(first, max(blocks) + 1)):
            if index in ffns:
                for matrix, total in zip(ffns[index].matrices[:-1], moments[index], strict=True):
                    total.update(stream.rows(batch, given.pop(matrix)))
    if not all(each.squares.isfinite().all() for both in moments.values() for each in both):
        raise ModelError(NOT_FINITE)
    return {
        index: Spread(
            torch.cat([ffns[index].by_neuron(each.mean) for each in both]),
            torch.cat([ffns[index].by_neuron(_deviation(each)) for each in both]),
        )
        for index, both in moments.items()
    }


def _deviation(moments: SecondMoments) -> Tensor:
    return (moments.squares - moments.mean.square()).clamp_min(0).sqrt()


def _average(each: Iterable[tuple[Spread, Match | None]]) -> Spread:
    """The mean of means and of deviations, with the neurons as they were matched."""
    ordered = [(spread.mean, spread.deviation) if match is None else _matched(spread, match) for spread, match in each]
    return Spread(*(torch.stack(values).mean(0) for values in zip(*ordered, strict=True)))


def _matched(spread: Spread, match: Match) -> tuple[Tensor, Tensor]:
    mean, deviation = spread.mean[:, match.order], spread.deviation[:, match.order]
    if match.signs is not None:
        mean[0] *= match.signs  # of what `up` gives; the gate's stays
    return mean, deviation


def _set(ffn: FFN, now: Spread, should: Spread) -> float:
    """Rescale an FFN's first matrices; return the ratio of the deviations, mean over the neurons."""
    # A deviation this small against the mean is what rounding leaves of a difference of squares: the neuron is always
    # given the same.
    moves = now.deviation > 1e-3 * now.mean.abs()
    scale = torch.where(moves, should.deviation / now.deviation, 1.0)
    first = ffn.matrices[:-1]
    shares = (each.split(len(scale) // len(first)) for each in (scale, now.mean, should.mean))
    for matrix, *known in zip(first, *shares, strict=True):
        factor, before, after = map(ffn.by_row, known)
        matrix.weight.mul_(factor[:, None])
        if matrix.bias is not None:
            matrix.bias.copy_((matrix.bias.float() - before) * factor + after)
    ratios = (now.deviation / should.deviation)[moves & (should.deviation > 0)]
    return float(ratios.mean()) if len(ratios) else 1.0
