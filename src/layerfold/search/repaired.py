"""Candidates that lack blocks and are repaired: each block by itself to choose among all, wholly for the finalists."""

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
from layerfold.text.windows import Windows


class Repairs:
    """Repairs candidates that lack blocks of a model, attentions too.

    Args:
        decoder: the model; never edited.
        calibration: the text that whole repairs are fitted to.
        quick: that of the quick ones.

    Attributes:
        edited: candidates that are repaired wholly, as long as `best` holds them.
    """

    def __init__(self, decoder: Decoder, calibration: Windows, quick: Windows, progress: Progress) -> None:
        decoder.model.eval()  # as where candidates are scored
        self._decoder, self._progress = decoder, progress
        self._repair, self._quick = Repair("refit+attention", calibration), quick
        self.edited = Edited(decoder)

    def stages(self, most: int) -> Spanned:
        """Return candidates that lack so many blocks at most, each of whose blocks is refitted by itself."""
        spans = spanning(self._decoder, self._quick, range(2, most + 2), progress=self._progress)
        return Spanned(self._decoder, spans)

    @property
    def known(self) -> dict[str, Any]:
        """What determines a repair, as JSON."""
        return {
            **self._repair.resolved(),
            "calibration": self._repair.windows.sha256,
            "quick": self._quick.sha256,
        }

    def best(self, finalists: Sequence[Blocks], selection: Scores, test: Scores) -> Blocks:
        """Repair candidates front to back, and choose one by the selection text; the test text is read for it alone.

        One candidate's weights are held beside the best so far, and none are made for what was measured before.

        Args:
            selection, test: measure `edited` on the two texts.
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
        for removed in finalists:
            measure(selection, removed)
            best = min(best, removed, key=rank)
            self.edited.held = {each: stepper for each, stepper in self.edited.held.items() if each == best}
        measure(test, best)
        self.edited.held.clear()
        return best

    def repaired(self, removed: Blocks) -> Decoder:
        """Return a candidate repaired front to back, with weights of its own."""
        kept = [index for index in range(self._decoder.n_blocks) if index not in removed]
        repaired = self._decoder.copy()
        repaired.keep_(kept)
        self._repair.apply(repaired, self._decoder, kept, {}, self._progress)
        return repaired
