"""Which windows of a text are held out of a fit, and what its rows weigh."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from layerfold.errors import InputError
from layerfold.inference.streaming import Stream
from layerfold.model.outputs import FLOOR
from layerfold.text.windows import TokenWindows

HELD_OUT = 8
"""Every 8th window is held out: those windows choose the ridges, and whether a fit is kept."""

WINDOWS = 16
"""Windows are cut in halves until there are this many."""

SHORTEST = 128
"""But not below this length, in tokens."""


def beginning(windows: TokenWindows, tokens: int) -> TokenWindows:
    """Return the first windows, which hold about so many tokens; at least one."""
    count = 1 + int((windows.lengths.cumsum(0)[:-1] < tokens).sum())
    some = {name: getattr(windows, name)[:count] for name in ("input_ids", "lengths", "first_scored")}
    return replace(windows, **some)


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
