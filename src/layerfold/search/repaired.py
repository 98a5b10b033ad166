"""Candidates that lack blocks and are repaired: each block by itself to choose among all, wholly for the finalists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from layerfold.decoder import Decoder
from layerfold.progress import Progress
from layerfold.repair import PROTOCOL
from layerfold.repairing import refit_
from layerfold.search.scores import Scores
from layerfold.search.stages import Blocks, Lacking, Spanned
from layerfold.spans import spanning
from layerfold.statistics import Floats
from layerfold.windows import Windows


class Repairs:
    """Repairs candidates that lack blocks of a model, attentions too.

    Args:
        decoder: the model; never edited.
        calibration: the text that repairs are fitted to.
    """

    def __init__(self, decoder: Decoder, calibration: Windows, progress: Progress) -> None:
        self._decoder, self._calibration, self._progress = decoder, calibration, progress

    def stages(self, most: int) -> Spanned:
        """Return candidates that lack so many blocks at most, each of whose blocks is refitted by itself."""
        return Spanned(self._decoder, spanning(self._decoder, self._calibration, most + 1, progress=self._progress))

    @property
    def known(self) -> dict[str, Any]:
        """What determines a repair, as JSON."""
        return {"protocol": PROTOCOL, "level": "refit+attention", "calibration": self._calibration.sha256}

    def best(self, finalists: Sequence[Blocks], selection: Windows, test: Windows) -> tuple[Blocks, Floats, Floats]:
        """Repair candidates front to back, and choose one by the selection text; the test text is read for it alone.

        One candidate's weights are held beside the best so far.

        Returns:
            The best one, and its sums of nats over the tokens of each window of the selection and of the test text.
        """
        found: tuple[Blocks, Floats, Decoder] | None = None
        for removed in finalists:
            repaired = self.repaired(removed)
            nats = _nats(repaired, selection, self._progress)
            if found is None or nats.sum() < found[1].sum():
                found = removed, nats, repaired
        assert found is not None
        removed, nats, repaired = found
        return removed, nats, _nats(repaired, test, self._progress)

    def repaired(self, removed: Blocks) -> Decoder:
        """Return a candidate repaired front to back, with weights of its own."""
        kept = [index for index in range(self._decoder.n_blocks) if index not in removed]
        repaired = self._decoder.copy()
        repaired.keep_(kept)
        cuts = [*kept[1:], self._decoder.n_blocks]
        refit_(repaired, self._decoder, cuts, self._calibration, attention=True, progress=self._progress)
        return repaired


def _nats(decoder: Decoder, windows: Windows, progress: Progress) -> Floats:
    scores = Scores(Lacking(decoder), windows, divergence=False)
    scores.measure([()], progress=progress, description="measuring a repaired model")
    return scores.values((), "perplexity")
