"""Removing neurons of FFNs and heads of attentions by one ranking over both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from layerfold.calibration import Calibration
from layerfold.errors import InputError
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


@torch.no_grad()
def thin_alike_(
    decoder: Decoder, amount: int, calibration: Calibration, multiple_of: int, *, nonzero: bool = False
) -> None:
    """Remove as many neurons from every FFN, and as many groups of heads from every attention.

    Of the numbers that make the model small enough, those are taken whose units the loss misses least. Heads stay where
    the configuration cannot say how many there are.

    Args:
        amount: how many parameters are to go at least.
        calibration: whose text is read.
        multiple_of: the number of neurons that each FFN keeps is a multiple of this.
        nonzero: count the parameters that are not zero only.

    Raises:
        InputError: FFNs or attentions differ in size, or the amount is too large.
    """
    found, felt = sublayers(decoder, nonzero=nonzero), calibration.sensitivities(decoder)
    ffns, attentions = ([each for each in found if each.part == part] for part in ("ffn", "attention"))
    width, heads = check_equal(decoder)
    by_ffn = [torch.stack([felt.neurons[index] for index in each.blocks]).sum(0) for each in ffns]
    by_head = [felt.heads[each.blocks[0]] for each in attentions]
    lowest = [torch.stack([each.sort().values for each in scores]).sum(0) for scores in (by_ffn, by_head) if scores]
    missed = [each.cumsum(0) for each in lowest]
    best: tuple[float, int, int] | None = None
    for kept, left in alike(decoder, amount, multiple_of, nonzero=nonzero):
        loss = float(missed[0][width - kept - 1]) if kept < width else 0.0
        loss += float(missed[1][heads - left - 1]) if left < heads else 0.0
        if best is None or loss < best[0]:
            best = loss, kept, left
    if best is None:
        raise InputError(
            f"{amount:,} parameters to remove alike from all blocks, each of which keeps {multiple_of} neurons; "
            "accepted: fewer, or a smaller multiple_of"
        )
    _, kept, left = best
    for scores, each in zip(by_ffn, ffns, strict=True):
        decoder.keep_neurons_(dict.fromkeys(each.blocks, _highest(scores, kept)))
    if left < heads:
        decoder.keep_heads_({each.blocks[0]: _highest(s, left) for s, each in zip(by_head, attentions, strict=True)})
        decoder.tell_heads_()


def _highest(scores: Tensor, count: int) -> Tensor:
    """Return the places of the highest scores, in order."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def alike(decoder: Decoder, amount: int, multiple_of: int, *, nonzero: bool = False) -> Iterator[tuple[int, int]]:
    """Yield the numbers of neurons and of groups of heads that blocks can keep, all alike, for an amount to go.

    Raises:
        InputError: FFNs or attentions differ in size.
    """
    found, (width, heads) = sublayers(decoder, nonzero=nonzero), check_equal(decoder)
    neuron, group = (
        sum(float(each.sizes.double().mean()) for each in found if each.part == part) for part in ("ffn", "attention")
    )
    for left in range(heads, 0, -1) if heads else [0]:
        short = amount - (heads - left) * group
        kept = width if short <= 0 else int((width - short / max(neuron, 1)) // multiple_of * multiple_of)
        if kept >= min(multiple_of, width) and (short <= 0 or width) and (left == heads or decoder.says_heads(left)):
            yield kept, left


def check_equal(decoder: Decoder) -> tuple[int, int]:
    """Return the number of neurons of each FFN, and that of heads of each attention.

    Raises:
        InputError: they differ.
    """
    return equal(decoder.d_ffn), equal(decoder.heads)


def equal(sizes: Iterable[int]) -> int:
    """Return the size that all blocks have which have any; 0 where none has.

    Raises:
        InputError: they differ.
    """
    found = sorted({size for size in sizes if size})
    if len(found) > 1:
        raise InputError(
            f"uniform, of blocks with {', '.join(map(str, found))} neurons or heads; accepted: as many in each"
        )
    return found[0] if found else 0


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
