"""Choice of a learning rate by short runs, downhill."""

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
        nats: nats per token of validation text at its end; infinite where it diverged.
        tokens: number of training tokens.
        seconds: duration.
    """

    learning_rate: float
    nats: float
    tokens: int
    seconds: float


def search(run: Callable[[float], Trial], path: Path, writes: bool) -> list[Trial]:
    """Try `FIRST_LEARNING_RATE` and its neighbours among `LEARNING_RATES`, until both neighbours of the best are worse.

    Args:
        run: runs one trial.
        path: file of the finished trials, which a resumed search does not repeat.
        writes: whether this process writes the file.

    Returns:
        All trials, by learning rate.

    Raises:
        TrainingError: all trials diverged.
    """
    tried: dict[float, Trial] = {}
    if path.is_file():
        tried = {trial["learning_rate"]: Trial(**trial) for trial in json.loads(path.read_text(encoding="utf-8"))}

    def nats(index: int) -> float:
        rate = LEARNING_RATES[index]
        if rate not in tried:
            tried[rate] = run(rate)
            if writes:
                write_text(path, json.dumps([asdict(trial) for trial in tried.values()], indent=1))
        return tried[rate].nats

    best = LEARNING_RATES.index(FIRST_LEARNING_RATE)
    while True:
        # In increasing order: where all diverge, the lower rate is next.
        near = [index for index in (best - 1, best, best + 1) if 0 <= index < len(LEARNING_RATES)]
        if (better := min(near, key=nats)) == best:
            break
        best = better
    trials = [tried[rate] for rate in LEARNING_RATES if rate in tried]
    if math.isinf(nats(best)):
        rates = ", ".join(f"{trial.learning_rate:g}" for trial in trials)
        raise TrainingError(f"training diverged at every learning rate tried: {rates}")
    return trials
