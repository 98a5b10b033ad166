"""Which blocks to drop: sets of which each is the one before it and one block more."""

from __future__ import annotations

from layerfold.model.decoder import Decoder
from layerfold.progress import Progress
from layerfold.repair.spans import spanning
from layerfold.search.scores import Scores
from layerfold.search.selection import Selection
from layerfold.search.stages import Blocks, Spanned
from layerfold.text.windows import Windows

_LONGEST = 6
"""For how many blocks one may have to stand, itself among them."""


class Order:
    """Finds the blocks that a decoder misses least once it is repaired, one after the other.

    With each block that is left refitted by itself, and racing on the selection text. No more than `_LONGEST` - 1
    neighbours go. Refits are made when a set first needs them, and held until `clear`.

    Args:
        decoder: stays as it is.
        fitted: the text that repairs are fitted to.
        windows: the selection text.
        seed: orders its windows.
    """

    def __init__(self, decoder: Decoder, fitted: Windows, windows: Windows, seed: int, progress: Progress) -> None:
        self._decoder, self._fitted, self._windows = decoder, fitted, windows
        self._seed, self._progress = seed, progress
        self._spans: dict[int, Decoder] = {}

    def next(self, blocks: Blocks) -> Blocks | None:
        """Return a set and the block that is missed least besides; None where all that are left would."""
        rest = (each for each in range(self._decoder.n_blocks) if each not in blocks)
        runs = {grown: longest_run(grown) for grown in (tuple(sorted((*blocks, each))) for each in rest)}
        short = [grown for grown, run in runs.items() if run < min(self._decoder.n_blocks, _LONGEST)]
        if not short:
            return None
        self._decoder.model.eval()
        lengths = set(range(2, max(runs[grown] for grown in short) + 2)) - self._spans.keys()
        self._spans |= spanning(self._decoder, self._fitted, lengths, progress=self._progress)
        scores = Scores(Spanned(self._decoder, self._spans), self._windows, divergence=False)
        select = Selection(scores, "perplexity", race=True, seed=self._seed, progress=self._progress)
        return select({len(short[0]): sorted(short)}, 1)[len(short[0])][0]

    def clear(self) -> None:
        """Let go of the refits; another question makes them again."""
        self._spans.clear()


def longest_run(blocks: Blocks) -> int:
    """Return how many neighbours there are among blocks, at most."""
    longest = run = 0
    for place, block in enumerate(blocks):
        run = run + 1 if place and blocks[place - 1] == block - 1 else 1
        longest = max(longest, run)
    return longest
