"""How fast a model of fewer blocks, neurons and heads will be: a line through four that are timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from layerfold.checkpoint.model import Model
from layerfold.maths.intervals import Interval
from layerfold.methods.prune.units import sublayers
from layerfold.progress import Progress
from layerfold.search.judging import latency
from layerfold.search.results import Timing

_LEAST = 0.05


@dataclass(frozen=True)
class Speeds:
    """Milliseconds a generated token: ``constant + blocks * (block + share * units)``.

    Attributes:
        blocks: how many the model has.
        constant, block, units: what the embeddings and the LM head take, a block without its units, and those: neurons
            and groups of heads.
        correction: how much longer it takes than that, as found out by timing what was made.
    """

    blocks: int
    constant: float
    block: float
    units: float
    correction: float = 1.0

    def share(self, blocks: int, speedup: float) -> float | None:
        """Return what share of the units may stay in so many blocks to be so many times as fast as the model.

        None where no share is small enough; 1 where all may stay.
        """
        wanted = (self.constant + self.blocks * (self.block + self.units)) / (speedup * self.correction)
        least = self.constant + blocks * self.block
        if least + blocks * self.units <= wanted:
            return 1.0
        share = (wanted - least) / (blocks * self.units) if self.units > 0 else 0.0
        return share if share >= _LEAST else None


def line(model: Model, rounds: int, progress: Progress) -> list[float]:
    """Time a model, half of its blocks, half of its neurons and heads, and half of both, interleaved: see `Speeds`."""
    depth = model.decoder.n_blocks
    points = [(blocks, share) for blocks in (depth, max(1, depth // 2)) for share in (1.0, 0.5)]
    models = {f"{blocks} {share}": _shaped(model, blocks, share) for blocks, share in points}
    scores = latency(model, rounds).compare(models, progress)
    # Of few heads a half may be more, or less: what is left of a block is counted.
    each = _units(model) / depth
    rows = np.array([[1.0, shaped.decoder.n_blocks, _units(shaped) / each] for shaped in models.values()])
    times = np.array([scores[label].value for label in models])
    return [float(depth), *(float(max(0.0, each)) for each in np.linalg.lstsq(rows, times, rcond=None)[0])]


def _units(model: Model) -> int:
    return sum(int(each.sizes.sum()) for each in sublayers(model.decoder))


def timed_beside(model: Model, made: Model, rounds: int, progress: Progress) -> tuple[Timing, Timing]:
    """Time a model and what was made of it, interleaved."""
    scores = latency(model, rounds).compare({"base": model, "plan": made}, progress)
    same = {"value": 1.0, "low": 1.0, "high": 1.0}
    base, plan = (
        Timing(Interval(score.value, score.low, score.high), Interval(**score.details.get("speedup", same)))
        for score in (scores["base"], scores["plan"])
    )
    return base, plan


def _shaped(model: Model, blocks: int, share: float) -> Model:
    """Return a model of an architecture."""
    decoder = model.decoder.copy(share=True)
    decoder.keep_(range(blocks))
    if share < 1:
        for index, width in enumerate(decoder.d_ffn):
            if width:
                decoder.blocks[index].ffn.own_()
        decoder.keep_neurons_(_first(decoder.d_ffn, share))
        decoder.keep_heads_(_first(decoder.heads, share))
    return model.of(decoder)


def _first(widths: Sequence[int], share: float) -> dict[int, Tensor]:
    """A share of what each block has, at least one; nothing of a block that has none."""
    return {index: torch.arange(max(1, round(share * width))) for index, width in enumerate(widths) if width}
