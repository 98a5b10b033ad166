"""What layerfold's plan makes of a model when it is told a number of parameters."""

from __future__ import annotations

from peers import Peer, Texts, budget

from layerfold.calibration import Calibration
from layerfold.checkpoint.model import Model
from layerfold.planning import Plan
from layerfold.planning import trials as planning


class Own:
    """The best candidate of a size; what was tried for one serves the next."""

    def __init__(self) -> None:
        self._trials: planning.Trials | None = None

    def __call__(self, model: Model, kept: int, texts: Texts) -> Model:
        """Return what the plan makes.

        Trials are repaired on all of the calibration text, as the finalist is. What each method by itself comes to is
        not tried: the other methods of the comparison are that.
        """
        if kept == model.decoder.n_blocks:
            return model.copy()
        if self._trials is None or self._trials.model is not model:
            text = texts.calibration
            read = planning.Texts(Calibration(model.decoder, text), text, text, texts.selection, 0)
            self._trials = planning.Trials(model, read)
        plan = Plan(parameters=budget(model.decoder, kept), points=0, finalists=1, rivals=False)
        return plan.find(self._trials)[1]


OWN = Peer("layerfold: plan", "", Own(), version=6)
