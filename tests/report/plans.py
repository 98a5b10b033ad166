"""What a plan tries, made up without running any model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from layerfold.checkpoint.weighing import Weighed
from layerfold.methods import Collapse, Drop, Merge, Method, Prune, Share
from layerfold.planning import Evaluation
from layerfold.planning.candidates import WHOLE, Configuration

MADE: dict[str, tuple[Method, ...]] = {
    "drop + prune": (Drop(blocks=(5, 6)), Prune(sparsity=0.25, structure="neurons", criterion="wanda")),
    "drop": (Drop(blocks=(3, 5, 6, 7)),),
    "collapse": (Collapse(n=2),),
    "merge": (Merge(n=3, tie=True),),
    "share": (Share(window="1:9", rank=8),),
    "prune": (Prune(sparsity=0.5, structure="neurons", criterion="wanda"),),
}


def trial(family: str, parameters: int, perplexity: float, whole: bool = False, repaired: bool = True) -> Evaluation:
    made = Configuration(family, MADE.get(family, ()), WHOLE if repaired else "none")
    blocks = (parameters - 2090048) // 405504
    size = {"parameters": parameters, "blocks": blocks, "neurons": parameters // 2000, "heads": 6 * blocks}
    return Evaluation(made, whole, **size, weighed=Weighed(2 * 6960768, 2 * parameters), perplexity=perplexity)


@dataclass(frozen=True)
class Saying(Configuration):
    """A configuration that says of itself what it is told to."""

    words: str = ""

    @property
    def said(self) -> str:
        return self.words


def saying(trial: Evaluation, words: str, family: str | None = None, **changes: Any) -> Evaluation:
    """Return a trial with other words for what was done."""
    made = trial.configuration
    return replace(trial, configuration=Saying(family or made.family, made.methods, made.repair, words), **changes)


TRIALS = (
    trial("drop + prune", 5777437, 90.25),
    trial("drop + prune", 4593795, 112.5),
    trial("drop", 4543104, 118.25),
    trial("drop", 4543104, 164.0, repaired=False),
    trial("collapse", 4186112, 390.5),
    trial("collapse", 4186112, 5871.0, repaired=False),
    trial("merge", 3904320, 240.0),
    trial("merge", 3904320, math.inf, repaired=False),
    trial("share", 4551104, 131.0),
    trial("share", 4551104, 320.0, repaired=False),
    trial("prune", 4593795, 121.75),
    trial("prune", 4593795, 244.5, repaired=False),
    trial("drop + prune", 4593795, 108.5, whole=True),
    trial("drop", 4543104, 114.0, whole=True),
)
