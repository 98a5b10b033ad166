"""Removing neurons of FFNs and heads of attentions by one ranking over both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layerfold.calibration import Calibration
from layerfold.model.decoder import Decoder


@dataclass(frozen=True)
class Sublayer:
    """An FFN, which several blocks may have, or an attention.

    Attributes:
        part: ``ffn`` or ``attention``.
        blocks: those that have it.
        sizes: how many parameters go with each of its neurons or groups of heads, (units,) int64.
    """

    part: str
    blocks: tuple[int, ...]
    sizes: Tensor


def sublayers(decoder: Decoder, *, nonzero: bool = False) -> list[Sublayer]:
    """Return all FFNs and attentions that there are.

    Args:
        nonzero: count the parameters that are not zero only.
    """
    found = [("ffn", blocks, decoder.blocks[blocks[0]].ffn.units) for blocks in decoder.blocks_by_ffn]
    found += [("attention", (each.index,), each.attention.units) for each in decoder.blocks if each.heads]
    return [Sublayer(part, blocks, _sizes(units, nonzero)) for part, blocks, units in found]


def _sizes(units: list[Tensor], nonzero: bool) -> Tensor:
    each = [unit.count_nonzero(1).cpu() if nonzero else torch.full((len(unit),), unit.shape[1]) for unit in units]
    return torch.stack(each).sum(0)


def removable(found: list[Sublayer]) -> int:
    """Count the parameters that can go: each FFN keeps its largest neuron, if need be, an attention nothing."""
    return sum(int(each.sizes.sum() - (each.sizes.max() if each.part == "ffn" else 0)) for each in found)


@torch.no_grad()
def thin_(decoder: Decoder, amount: int, calibration: Calibration, *, nonzero: bool = False) -> None:
    """Remove the neurons and groups of heads that the loss misses least for their size, an attention without any too.

    In order of `sensitivities` a parameter, until so many parameters have gone; a group of heads that is larger than
    what is left to go is passed over. Each FFN keeps the neuron that it would miss most.

    Args:
        amount: how many parameters are to go; by the last unit there may be a few more.
        calibration: whose text is read.
        nonzero: count the parameters that are not zero only.
    """
    found = sublayers(decoder, nonzero=nonzero)
    felt = calibration.sensitivities(decoder)
    scores = []
    for each in found:
        by_block = felt.neurons if each.part == "ffn" else felt.heads
        score = torch.stack([by_block[index] for index in each.blocks]).sum(0) / each.sizes.clamp_min(1)
        if each.part == "ffn":
            score[score.argmax()] = torch.inf
        scores.append(score)
    marked = _lowest(found, torch.cat(scores), amount).split([len(each.sizes) for each in found])
    for each, gone in zip(found, marked, strict=True):
        kept = (~gone).nonzero()[:, 0]
        if each.part == "ffn":
            decoder.keep_neurons_(dict.fromkeys(each.blocks, kept))
        elif len(kept):
            decoder.keep_heads_(dict.fromkeys(each.blocks, kept))
        else:
            decoder.remove_("attention", each.blocks)


def _lowest(found: list[Sublayer], scores: Tensor, amount: int) -> Tensor:
    """Mark the units to remove, (units,) bool."""
    sizes = torch.cat([each.sizes for each in found]).tolist()
    marked = torch.zeros(len(sizes), dtype=torch.bool)
    order = scores.argsort(stable=True)[: int(scores.isfinite().sum())].tolist()
    neuron = max((int(each.sizes.max()) for each in found if each.part == "ffn"), default=0)
    for unit in order:
        if amount > 0 and sizes[unit] <= max(amount, neuron):
            marked[unit] = True
            amount -= sizes[unit]
    passed = [unit for unit in order if not marked[unit]]
    if amount > 0 and passed:  # each of them is larger than what is left to go: one will do
        marked[min(passed, key=sizes.__getitem__)] = True
    return marked
