"""Predicted latency of a model with fewer attentions, FFNs, neurons and heads: a line through models that are timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from layerfold.checkpoint.model import Model
from layerfold.errors import InputError
from layerfold.methods.prune.units import sublayers
from layerfold.methods.thin.versions import Shape
from layerfold.model.block import PARTS
from layerfold.model.decoder import Decoder
from layerfold.progress import Progress
from layerfold.search.judging import latency, timing
from layerfold.search.results import Timing

_LEAST = 0.05


@dataclass(frozen=True)
class Speeds:
    """Milliseconds a generated token: those of what is outside the blocks, and of each block.

    Attributes:
        blocks: depth of the model.
        constant: of the embeddings and the LM head.
        attention, ffn: of a block's attention and its FFN, without heads and neurons.
        units: of a block's heads and neurons.
        correction: measured latency divided by the predicted, of a model that was built.
    """

    blocks: int
    constant: float
    attention: float
    ffn: float
    units: float
    correction: float = 1.0

    @property
    def block(self) -> float:
        """Milliseconds of a block without its neurons and heads."""
        return self.attention + self.ffn

    def of(self, shape: Shape, share: float) -> float:
        """Return the milliseconds of a block that keeps some heads and neurons, a share of its parameters."""
        return self.attention * (shape.heads > 0) + self.ffn * (shape.neurons > 0) + self.units * share

    def left(self, speedup: float) -> float:
        """Return the milliseconds that all blocks together may take to reach a speed-up."""
        whole = self.constant + self.blocks * (self.block + self.units)
        return whole / (speedup * self.correction) - self.constant

    def share(self, blocks: int, speedup: float) -> float | None:
        """Return the share of neurons and heads that some blocks may keep to reach a speed-up.

        None where no share is small enough; 1 where all may stay.
        """
        spare = self.left(speedup) - blocks * self.block
        if blocks * self.units <= spare:
            return 1.0
        share = spare / (blocks * self.units) if self.units > 0 else 0.0
        return share if share >= _LEAST else None


def line(model: Model, rounds: int, progress: Progress) -> list[float]:
    """Return the five numbers of `Speeds`, from models that are timed interleaved.

    They are the model, half of its blocks, half of its neurons and heads, half of both; and, where those can be
    removed, all blocks with half of the attentions, and with half of the FFNs. Where not, attentions and FFNs are taken
    to cost the same.
    """
    depth = model.decoder.n_blocks
    points = [(blocks, share) for blocks in (depth, max(1, depth // 2)) for share in (1.0, 0.5)]
    models = {f"{blocks} {share}": _shaped(model, blocks, share) for blocks, share in points}
    models |= {part: lacking for part in PARTS if (lacking := _lacking(model, part)) is not None}
    scores = latency(model, rounds).compare(models, progress)
    # Half of a few heads may be more or fewer than half: units are counted.
    whole = _units(model) / depth
    rows = np.array(
        [[1.0, *(_parts(shaped.decoder, part) for part in PARTS), _units(shaped) / whole] for shaped in models.values()]
    )
    times = np.array([scores[label].value for label in models])
    return [float(depth), *(float(max(0.0, slope)) for slope in np.linalg.lstsq(rows, times, rcond=None)[0])]


def _parts(decoder: Decoder, part: str) -> int:
    """Count the attentions or the FFNs."""
    return decoder.n_blocks - len(decoder.removed_parts[part])


def _lacking(model: Model, part: str) -> Model | None:
    """Return the model without the attention, or the FFN, of every second block that has one."""
    decoder = model.decoder.copy(share=True)
    there = [index for index in range(decoder.n_blocks) if index not in decoder.removed_parts[part]]
    try:
        decoder.remove_(part, there[1::2])
    except InputError:
        return None
    return model.of(decoder)


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
