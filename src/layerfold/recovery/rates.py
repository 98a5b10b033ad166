"""Choosing a learning rate by short runs, downhill."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from layerfold.errors import TrainingError
from layerfold.files import write_text
from layerfold.recovery.base import FIRST_LEARNING_RATE, LEARNING_RATES


@dataclass(frozen=True)
class Trial:
    """A short run.

    Attributes:
        nats: per token of validation text at its end; infinite where it diverged.
        tokens: it trained on.
        seconds: it took.
    """

    learning_rate: float
    nats: float
    tokens: int
    seconds: float


def search(run: Callable[[float], Trial], path: Path, writes: bool) -> list[Trial]:
    """Try `FIRST_LEARNING_RATE` and its neighbours among `LEARNING_RATES`, until both of the best one's are worse.

    Args:
        run: makes one trial.
        path: a file that keeps what was tried, so that a killed search repeats none.
        writes: whether this process is the one that writes it.

    Returns:
        All trials, by learning rate.

    Raises:
        TrainingError: each of them diverged.
    """
    tried: dict[float, Trial] = {}
    if path.is_file():
        tried = {each["learning_rate"]: Trial(**each) for each in json.loads(path.read_text(encoding="utf-8"))}

    def nats(index: int) -> float:
        rate = LEARNING_RATES[index]
        if rate not in tried:
            tried[rate] = run(rate)
            if writes:
                write_text(path, json.dumps([asdict(each) for each in tried.values()], indent=1))
        return tried[rate].nats

    best, stands = LEARNING_RATES.index(FIRST_LEARNING_RATE), False
    while not stands:
        # The lower first: it is taken where both diverge.
        near = [index for index in (best - 1, best, best + 1) if 0 <= index < len(LEARNING_RATES)]
        better = min(near, key=nats)
        best, stands = better, better == best
    trials = [tried[rate] for rate in LEARNING_RATES if rate in tried]
    if math.isinf(nats(best)):
        rates = ", ".join(f"{each.learning_rate:g}" for each in trials)
        raise TrainingError(f"training diverged at every learning rate tried: {rates}")
    return trials
