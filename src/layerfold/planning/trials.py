"""What has been tried: each candidate repaired on little text and scored on the selection text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from layerfold.calibration import Calibration
from layerfold.checkpoint.model import Model
from layerfold.checkpoint.save import hash_weights
from layerfold.evaluators import Perplexity
from layerfold.files import hash_json, write_text
from layerfold.inference.scoring import window_nats
from layerfold.maths.intervals import exponential
from layerfold.pipeline import apply
from layerfold.planning.candidates import Candidate, count
from layerfold.planning.order import Order
from layerfold.progress import SILENT, Progress
from layerfold.repair.repair import Repair
from layerfold.search.stages import Blocks
from layerfold.text.windows import Windows

PROTOCOL = "plan-4"
FILE = "trials.json"


@dataclass(frozen=True)
class Texts:
    """What a plan reads.

    Attributes:
        calibration: what methods read activations from.
        quick, whole: what repairs are fitted to: those of trials, and those of finalists.
        selection: what candidates are scored on.
        seed: that calibration text was ordered by.
    """

    calibration: Calibration
    quick: Windows
    whole: Windows
    selection: Perplexity
    seed: int


@dataclass(frozen=True)
class Trial:
    """What a candidate came to.

    Attributes:
        said, family, repair: see `Candidate`.
        row: the candidate as a recipe has it, without its label.
        whole: whether it was repaired on all of the text that there is for that.
        parameters, blocks, neurons, heads: how many it has; neurons in all FFNs, groups of heads in all attentions.
        perplexity: on the selection text.
    """

    said: str
    family: str
    repair: str
    row: dict[str, Any] = field(hash=False)
    whole: bool
    parameters: int
    blocks: int
    neurons: int
    heads: int
    perplexity: float


class Trials:
    """Tries candidates, each once, and remembers what came of them.

    Args:
        model: never edited.
        folder: where that is kept; None keeps nothing.

    Attributes:
        done: what was tried in this run, in order.
    """

    def __init__(self, model: Model, texts: Texts, folder: Path | None = None, progress: Progress = SILENT) -> None:
        self.model, self._texts, self._progress = model, texts, progress
        self._windows = texts.selection.windows(model)
        self._tokens = (self._windows.lengths - self._windows.first_scored).double().numpy()
        self._file = None if folder is None else folder / FILE
        self._known = {
            "model": hash_weights(model.decoder.model),
            "seed": texts.seed,
            "protocol": PROTOCOL,
            "texts": [text.sha256 for text in (texts.calibration.windows, texts.quick, texts.whole, self._windows)],
        }
        self._kept: dict[str, Any] = self._read()
        self._order = Order(model.decoder, texts.quick, self._windows, texts.seed, progress)
        self.done: dict[str, Trial] = {}

    def base(self) -> Trial:
        """Return the model as it is."""
        return self._trial(Candidate("base", (), "none"), False, lambda: self.model)

    def quick(self, candidate: Candidate) -> Trial:
        """Try a candidate."""
        with self._progress.doing(f"trying: {candidate.said}"):
            return self._trial(candidate, False, lambda: self.made(candidate, whole=False))

    def whole(self, candidate: Candidate) -> tuple[Trial, Model | None]:
        """Try a candidate with all of its repair; return the model too, where it was made now."""
        made: list[Model] = []

        def make() -> Model:
            made.append(self.made(candidate))
            return made[0]

        return self._trial(candidate, True, make), made[0] if made else None

    def made(self, candidate: Candidate, *, whole: bool = True) -> Model:
        """Return what a candidate makes of the model."""
        texts = self._texts
        windows = texts.whole if whole else texts.quick
        repair = None if candidate.repair == "none" else Repair(candidate.repair, windows)
        progress = self._progress if whole else SILENT
        base = self.model.copy()
        return apply(base, candidate.method, texts.calibration, texts.seed, texts.selection, progress, repair)[0]

    def without(self, number: int) -> Blocks | None:
        """Return so many blocks to drop, see `Order`; None where it ends before."""
        key = self._key("order")
        found: list[list[int]] = self._kept.get(key, [])
        if not _growing(found, self.model.decoder.n_blocks):
            found = [[]]
        while len(found) <= number:
            blocks = self._order.next(tuple(found[-1]))
            if blocks is None:
                return None
            found = [*found, list(blocks)]
            self._keep(key, found)
        return tuple(found[number])

    def clear(self) -> None:
        """Let go of what `without` works with; asked again, it makes that again."""
        self._order.clear()

    def remembered(self, name: str, make: Callable[[], list[float]]) -> list[float]:
        """Return numbers that were made now or in an earlier run in this folder."""
        if (key := self._key(name)) not in self._kept:
            self._keep(key, make())
        found: list[float] = self._kept[key]
        return found

    def _trial(self, candidate: Candidate, whole: bool, make: Callable[[], Model]) -> Trial:
        row = candidate.row("")
        del row["label"]
        key = self._key({"row": row, "whole": whole})
        if key not in self._kept:
            decoder = make().decoder
            mean = float(window_nats(decoder, self._windows).sum() / self._tokens.sum())
            counts = count(decoder), decoder.n_blocks, sum(decoder.d_ffn), sum(decoder.heads)
            self._keep(key, [mean if math.isfinite(mean) else None, *counts])
        nats, parameters, blocks, neurons, heads = self._kept[key]
        self.done[key] = Trial(
            said=candidate.said,
            family=candidate.family,
            repair=candidate.repair,
            row=row,
            whole=whole,
            parameters=parameters,
            blocks=blocks,
            neurons=neurons,
            heads=heads,
            perplexity=math.inf if nats is None else exponential(nats),
        )
        return self.done[key]

    def _key(self, what: Any) -> str:
        return hash_json({**self._known, "what": what})

    def _keep(self, key: str, value: Any) -> None:
        self._kept[key] = value
        if self._file is not None:
            write_text(self._file, json.dumps(self._kept, indent=0))

    def _read(self) -> dict[str, Any]:
        """Return what an interrupted run kept; damaged, it is as if there were nothing."""
        try:
            found = {} if self._file is None else json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {key: value for key, value in found.items() if _readable(value)} if isinstance(found, dict) else {}


def _readable(value: Any) -> bool:
    """Whether a value is one that is kept: numbers, the first of which may be missing, or sets of blocks."""
    if not isinstance(value, list) or len(value) < 2:
        return False
    if isinstance(value[0], list):
        return all(isinstance(each, list) and all(type(index) is int for index in each) for each in value)
    numbers = [type(each) in (int, float) for each in value]
    return len(value) in (4, 5) and (numbers[0] or value[0] is None) and all(numbers[1:])


def _growing(found: list[list[int]], blocks: int) -> bool:
    """Whether lists are sets of blocks, none and then one more each."""
    return found[:1] == [[]] and all(
        len(two) == number and set(one) < set(two) <= set(range(blocks))
        for number, (one, two) in enumerate(pairwise(found), 1)
    )


def as_json(trial: Trial) -> Mapping[str, Any]:
    """Return a trial as JSON, which has no word for infinity."""
    return asdict(trial) | {"perplexity": trial.perplexity if math.isfinite(trial.perplexity) else None}
