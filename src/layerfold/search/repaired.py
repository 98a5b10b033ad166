"""Repaired candidates: quickly, each block by itself, to choose among all; wholly, to choose among the finalists."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from layerfold.inference.stepping import Stepper
from layerfold.model.decoder import Decoder
from layerfold.progress import Progress
from layerfold.repair.repair import Repair
from layerfold.repair.spans import spanning
from layerfold.search.scores import Scores
from layerfold.search.stages import Blocks, Edited, Spanned
from layerfold.text.windows import TokenWindows


class Repairs:
    """Repairs candidates without some blocks of a model, attentions included.

    Args:
        decoder: the model; never edited.
        calibration, quick: the texts that whole repairs and quick ones are fitted to.

    Attributes:
        edited: wholly repaired candidates, as long as `best` holds them.
    """

    def __init__(self, decoder: Decoder, calibration: TokenWindows, quick: TokenWindows, progress: Progress) -> None:
        decoder.model.eval()  # as where candidates are scored
        self._decoder, self._progress = decoder, progress
        self._repair, self._quick = Repair("refit+attention", calibration), quick
        self.edited = Edited(decoder)

    def stages(self, most: int) -> Spanned:
        """Return candidates whose blocks are refitted one by one.

        Args:
            most: largest number of blocks that a candidate lacks.
        """
        spans = spanning(self._decoder, self._quick, range(2, most + 2), progress=self._progress)
        return Spanned(self._decoder, spans)

    @property
    def known(self) -> dict[str, Any]:
        """What determines a repair, as JSON."""
        texts = {"calibration": self._repair.windows.sha256, "quick": self._quick.sha256}
        return {**self._repair.resolved(), **texts}

    def best(self, finalists: Sequence[Blocks], selection: Scores, test: Scores) -> Blocks:
        """Repair candidates front to back and choose one by the selection text; only that one reads the test text.

        The weights of one candidate are held beside the best so far. What was measured before is not repaired again.

        Args:
            selection, test: scores of `edited` on the two texts.
        """

        def measure(scores: Scores, removed: Blocks) -> None:
            if scores.lacks(removed):
                if removed not in self.edited.held:
                    self.edited.held[removed] = Stepper(self.repaired(removed))
                scores.measure([removed], progress=self._progress, description="measuring a repaired model")

        def rank(removed: Blocks) -> tuple[bool, float]:
            mean = selection.mean(removed, "perplexity")
            return math.isnan(mean), mean

        best = finalists[0]
        held = self.edited.held
        for removed in finalists:
            measure(selection, removed)
            best = min(best, removed, key=rank)
            for worse in held.keys() - {best}:
                del held[worse]
        measure(test, best)
        held.clear()
        return best

    def repaired(self, removed: Blocks) -> Decoder:
        """Return a candidate repaired front to back, with weights of its own."""
        kept = [index for index in range(self._decoder.n_blocks) if index not in removed]
        repaired = self._decoder.copy()
        repaired.keep_(kept)
        self._repair.apply(repaired, self._decoder, kept, {}, self._progress)
        return repaired
