"""Predicted latency of a model with fewer blocks, neurons and heads: a line through four models that are timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from layerfold.checkpoint.model import Model
from layerfold.methods.prune.units import sublayers
from layerfold.progress import Progress
from layerfold.search.judging import latency, timing
from layerfold.search.results import Timing

_LEAST = 0.05


@dataclass(frozen=True)
class Speeds:
    """Milliseconds a generated token: ``constant + blocks * (block + share * units)``.

    Attributes:
        blocks: depth of the model.
        constant, block, units: of the embeddings and the LM head, of a block without its neurons and heads, and of
            those.
        correction: measured latency divided by the predicted, of a model that was built.
    """

    blocks: int
    constant: float
    block: float
    units: float
    correction: float = 1.0

    def share(self, blocks: int, speedup: float) -> float | None:
        """Return the share of neurons and heads that some blocks may keep to reach a speed-up.

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
    # Half of a few heads may be more or fewer than half: units are counted.
    whole = _units(model) / depth
    rows = np.array([[1.0, shaped.decoder.n_blocks, _units(shaped) / whole] for shaped in models.values()])
    times = np.array([scores[label].value for label in models])
    return [float(depth), *(float(max(0.0, slope)) for slope in np.linalg.lstsq(rows, times, rcond=None)[0])]


def _units(model: Model) -> int:
    """Count the parameters of neurons and heads."""
    return sum(int(each.sizes.sum()) for each in sublayers(model.decoder))


def timed_beside(model: Model, made: Model, rounds: int, progress: Progress) -> tuple[Timing, Timing]:
    """Time a model and what was made of it, interleaved."""
    scores = latency(model, rounds).compare({"base": model, "plan": made}, progress)
    return timing(scores["base"].to_json()), timing(scores["plan"].to_json())


def _shaped(model: Model, blocks: int, share: float) -> Model:
    """Return the model's first blocks, with a share of their neurons and heads."""
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
    """Indices of a share of each block's units, at least one; blocks without units are left out."""
    return {index: torch.arange(max(1, round(share * width))) for index, width in enumerate(widths) if width}
