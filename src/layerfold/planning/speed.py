"""How fast a model of fewer blocks and neurons will be: a line through four that are timed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from layerfold.hub import Model
from layerfold.progress import Progress
from layerfold.search.found import Timing
from layerfold.search.timing import latency
from layerfold.statistics import Interval

_LEAST = 0.05


@dataclass(frozen=True)
class Speeds:
    """Milliseconds a generated token: ``constant + blocks * (block + share * ffn)``.

    Attributes:
        blocks: how many the model has.
        constant, block, ffn: what the embeddings and the head take, a block without its FFN's neurons, and those.
        correction: how much longer it takes than that, as found out by timing what was made.
    """

    blocks: int
    constant: float
    block: float
    ffn: float
    correction: float = 1.0

    def share(self, blocks: int, speedup: float) -> float | None:
        """Return what share of the neurons may stay in so many blocks to be so many times as fast as the model.

        None where no share is small enough; 1 where all may stay.
        """
        wanted = (self.constant + self.blocks * (self.block + self.ffn)) / (speedup * self.correction)
        least = self.constant + blocks * self.block
        if least + blocks * self.ffn <= wanted:
            return 1.0
        share = (wanted - least) / (blocks * self.ffn) if self.ffn > 0 else 0.0
        return share if share >= _LEAST else None


def line(model: Model, rounds: int, progress: Progress) -> list[float]:
    """Time a model, half of its blocks, half of its neurons, and half of both, interleaved: see `Speeds`."""
    depth = model.decoder.n_blocks
    points = [(blocks, share) for blocks in (depth, max(1, depth // 2)) for share in (1.0, 0.5)]
    models = {f"{blocks} {share}": _shaped(model, blocks, share) for blocks, share in points}
    scores = latency(model, rounds).compare(models, progress)
    rows = np.array([[1.0, blocks, blocks * share] for blocks, share in points])
    times = np.array([scores[label].value for label in models])
    return [float(depth), *(float(max(0.0, each)) for each in np.linalg.lstsq(rows, times, rcond=None)[0])]


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
        kept = {index: torch.arange(max(1, round(share * width))) for index, width in enumerate(decoder.d_ffn) if width}
        decoder.keep_neurons_(kept)
    return Model(decoder, model.tokenizer, model.provenance)
