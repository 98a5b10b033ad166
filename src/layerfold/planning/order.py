"""Which blocks to drop: sets that each hold the one before them and one block more."""

from __future__ import annotations

from itertools import groupby

from layerfold.model.decoder import Decoder
from layerfold.progress import Progress
from layerfold.repair.spans import spanning
from layerfold.search.scores import Scores
from layerfold.search.selection import Selection
from layerfold.search.stages import Blocks, Spanned
from layerfold.text.windows import TokenWindows

_LONGEST = 6
"""Longest run of blocks that one refitted block may replace, itself included."""


class Order:
    """Finds one after the other the blocks whose removal costs least, with each block that is left refitted.

    Blocks race on the selection text. Refits are made when a set first needs them, and held until `clear`.

    Args:
        decoder: never edited.
        fitted: the text that repairs are fitted to.
        windows: the selection text.
        seed: orders its windows.
    """

    def __init__(
        self, decoder: Decoder, fitted: TokenWindows, windows: TokenWindows, seed: int, progress: Progress
    ) -> None:
        self._decoder, self._fitted, self._windows = decoder, fitted, windows
        self._seed, self._progress = seed, progress
        self._spans: dict[int, Decoder] = {}

    def next(self, blocks: Blocks) -> Blocks | None:
        """Return a set with the next block added; None where every further block makes a run too long."""
        rest = (block for block in range(self._decoder.n_blocks) if block not in blocks)
        runs = {grown: longest_run(grown) for grown in (tuple(sorted((*blocks, block))) for block in rest)}
        short = [grown for grown, run in runs.items() if run < min(self._decoder.n_blocks, _LONGEST)]
        if not short:
            return None
        self._decoder.model.eval()
        lengths = set(range(2, max(runs[grown] for grown in short) + 2)) - self._spans.keys()
        self._spans |= spanning(self._decoder, self._fitted, lengths, progress=self._progress)
        scores = Scores(Spanned(self._decoder, self._spans), self._windows, divergence=False)
        return Selection(scores, "perplexity", race=True, seed=self._seed, progress=self._progress).best(sorted(short))

    def clear(self) -> None:
        """Let go of the refits; another question makes them again."""
        self._spans.clear()


def longest_run(blocks: Blocks) -> int:
    """Return the length of the longest run of neighbours among blocks in order."""
    runs = groupby(enumerate(blocks), key=lambda entry: entry[1] - entry[0])
    return max((len(list(run)) for _, run in runs), default=0)
