"""Choosing the lowest of many scores, exactly as many as asked for, whatever ties there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

_DIGITS = 1 << 16


def shares(count: int, sizes: Tensor) -> Tensor:
    """Split a count over groups in proportion to their sizes, (groups,) int64, so that the shares add up to it.

    No share exceeds its group's size where the count does not exceed their sum.
    """
    total = max(int(sizes.sum()), 1)
    # In Python's integers: of a model of billions of weights the products are beyond 64 bits.
    upto = [count * size // total for size in sizes.cumsum(0).tolist()]
    found = torch.tensor(upto, dtype=torch.int64, device=sizes.device)
    return torch.diff(found, prepend=found.new_zeros(1))


def lowest_in_rows(scores: Tensor, counts: Tensor) -> Tensor:
    """Mark the lowest of each row, as many as its count says; of equal ones those that come first.

    Args:
        scores: (rows, columns), of any floating type; they are compared as float32.
        counts: (rows,), or one for all.

    Returns:
        Boolean, (rows, columns).
    """
    counts, scores = counts.to(scores.device).expand(len(scores))[:, None], scores.float()
    if scores.device.type == "cpu":
        ordered = torch.from_numpy(np.sort(scores.numpy(), axis=1))  # many times as fast as torch's, and no indices
    else:
        ordered = scores.sort(dim=1).values
    bounds = ordered.gather(1, (counts - 1).clamp_min(0))
    below, equal = scores < bounds, scores == bounds
    missing = counts - below.sum(1, keepdim=True)
    if not torch.equal(equal.sum(1, keepdim=True), missing):
        equal &= equal.cumsum(1) <= missing
    return below | equal


def lowest(scores: Callable[[], Iterable[Tensor]], count: int) -> Iterator[Tensor]:
    """Mark the lowest of the scores of several tensors taken together; of equal ones those that come first.

    The scores are counted by the upper and then by the lower half of their bits, so that not all are held at once.

    Args:
        scores: yields the same tensors each time, none below zero, of any floating type: they are compared as float32.
        count: how many to mark.

    Yields:
        A boolean tensor for each, of its shape.
    """
    upper, before = _reached(_counted(scores, lambda bits: bits >> 16), count)
    lower, between = _reached(_counted(scores, lambda bits: bits[bits >> 16 == upper] & 0xFFFF), count - before)
    ties, bound = count - before - between, (upper << 16) + lower
    for each in scores():
        bits = _bits(each)
        marked, equal = bits < bound, bits == bound
        if ties:
            found = equal.flatten().nonzero()[:ties, 0]
            marked.view(-1)[found] = True
            ties -= len(found)
        yield marked


def _bits(scores: Tensor) -> Tensor:
    """The bits of float32 numbers from zero up, int32, which are ordered as the numbers are; half floats are not."""
    return scores.float().contiguous().view(torch.int32)


def _counted(scores: Callable[[], Iterable[Tensor]], digits: Callable[[Tensor], Tensor]) -> Tensor:
    """How often each digit of 16 bits occurs, (65536,)."""
    counts = torch.zeros(_DIGITS, dtype=torch.int64)
    for each in scores():
        counts += torch.bincount(digits(_bits(each).flatten()), minlength=_DIGITS).cpu()
    return counts


def _reached(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The digit at which as many as wanted have been counted, and how many come before it."""
    upto = counts.cumsum(0)
    digit = int(torch.searchsorted(upto, torch.tensor(wanted)))
    return digit, int(upto[digit - 1]) if digit else 0
