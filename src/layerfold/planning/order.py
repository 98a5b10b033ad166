"""Which blocks to drop: sets of which each is the one before it and one block more."""

from __future__ import annotations

from functools import cached_property

from layerfold.decoder import Decoder
from layerfold.progress import Progress
from layerfold.search.scores import Scores
from layerfold.search.selection import Selection
from layerfold.search.stages import Blocks, Spanned
from layerfold.spans import spanning
from layerfold.windows import Windows

_LONGEST = 6
"""For how many blocks one may have to stand, itself among them."""


class Order:
    """Finds the blocks that a decoder misses least once it is repaired, one after the other.

    With each block that is left refitted by itself, and racing on the selection text. No more than `_LONGEST` - 1
    neighbours go: that many refits of every block are held, from the first question on.

    Args:
        decoder: stays as it is.
        fitted: the text that repairs are fitted to.
        windows: the selection text.
        seed: orders its windows.
    """

    def __init__(self, decoder: Decoder, fitted: Windows, windows: Windows, seed: int, progress: Progress) -> None:
        self._decoder, self._fitted, self._windows = decoder, fitted, windows
        self._seed, self._progress = seed, progress
        self._longest = min(decoder.n_blocks, _LONGEST)

    def next(self, blocks: Blocks) -> Blocks | None:
        """Return a set and the block that is missed least besides; None where all that are left would."""
        rest = (each for each in range(self._decoder.n_blocks) if each not in blocks)
        grown = sorted(tuple(sorted((*blocks, each))) for each in rest)
        short = [each for each in grown if longest_run(each) < self._longest]
        return self._select({len(blocks) + 1: short}, 1)[len(blocks) + 1][0] if short else None

    @cached_property
    def _select(self) -> Selection:
        self._decoder.model.eval()
        spans = spanning(self._decoder, self._fitted, self._longest, progress=self._progress)
        scores = Scores(Spanned(self._decoder, spans), self._windows, divergence=False)
        return Selection(scores, "perplexity", race=True, seed=self._seed, progress=self._progress)


def longest_run(blocks: Blocks) -> int:
    """Return how many neighbours there are among blocks, at most."""
    longest = run = 0
    for place, block in enumerate(blocks):
        run = run + 1 if place and blocks[place - 1] == block - 1 else 1
        longest = max(longest, run)
    return longest
