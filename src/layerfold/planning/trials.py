"""Trials: configurations that are built, repaired and scored on the selection text, each once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import astuple, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from layerfold.calibration import Calibration
from layerfold.checkpoint.model import Model
from layerfold.checkpoint.save import hash_weights
from layerfold.checkpoint.weighing import Weighed, weigh
from layerfold.checkpoint.weighing import parameters as count
from layerfold.errors import InputError
from layerfold.evaluators import Perplexity
from layerfold.files import hash_json, write_text
from layerfold.inference.holding import beginning
from layerfold.inference.scoring import window_nats
from layerfold.maths.intervals import exponential
from layerfold.methods.thin.method import check
from layerfold.methods.thin.versions import Shape
from layerfold.pipeline import apply
from layerfold.planning.candidates import Configuration
from layerfold.planning.library import GONE, Choice, Library, Limit
from layerfold.planning.order import Order
from layerfold.planning.speed import Speeds
from layerfold.progress import SILENT, Progress
from layerfold.repair.repair import Repair
from layerfold.search.results import number
from layerfold.search.stages import Blocks
from layerfold.text.windows import TokenWindows

PROTOCOL = "plan-6"
FILE = "trials.json"

_FITTED = 8_192
"""Calibration tokens that a library's versions are fitted to."""

_LARGEST = 64_000_000, 1_000_000_000
"""Most parameters of a model that has a library: on a processor, where larger ones take hours, and on a GPU.

It takes some fifteen times the memory of the model's blocks."""


@dataclass(frozen=True)
class Texts:
    """What a plan reads.

    Attributes:
        calibration: what methods read activations from.
        quick, whole: what repairs are fitted to, in trials and of finalists.
        selection: what configurations are scored on.
        seed: orders the calibration text.
    """

    calibration: Calibration
    quick: TokenWindows
    whole: TokenWindows
    selection: Perplexity
    seed: int


@dataclass(frozen=True)
class Evaluation:
    """A configuration and what it comes to.

    Attributes:
        whole: whether it was repaired on all of the calibration text.
        parameters, blocks, neurons, heads: counts; neurons of all FFNs, groups of heads of all attentions.
        weighed: what the weights take on disk.
        perplexity: on the selection text.
    """

    configuration: Configuration
    whole: bool
    parameters: int
    blocks: int
    neurons: int
    heads: int
    weighed: Weighed
    perplexity: float

    @property
    def said(self) -> str:
        """See `Configuration`."""
        return self.configuration.said

    @property
    def family(self) -> str:
        """See `Configuration`."""
        return self.configuration.family

    @property
    def repair(self) -> str:
        """See `Configuration`."""
        return self.configuration.repair

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON, which has no infinity."""
        return {
            "said": self.said,
            "family": self.family,
            "repair": self.repair,
            "row": self.configuration.row,
            "whole": self.whole,
            "parameters": self.parameters,
            "blocks": self.blocks,
            "neurons": self.neurons,
            "heads": self.heads,
            "dense_bytes": self.weighed.dense,
            "compact_bytes": self.weighed.compact,
            "perplexity": number(self.perplexity),
        }


@dataclass(frozen=True)
class Fast:
    """A budget of time: a speed-up that is to be reached, as latencies are predicted."""

    timed: Speeds
    speedup: float


class Trials:
    """Evaluates configurations, each once, and keeps the results.

    Args:
        model: never edited.
        folder: where results are kept; None keeps nothing.

    Attributes:
        done: evaluations of this run, in order.
    """

    def __init__(self, model: Model, texts: Texts, folder: Path | None = None, progress: Progress = SILENT) -> None:
        self.model, self._texts, self._progress = model, texts, progress
        self._windows = texts.selection.windows(model)
        self._file = None if folder is None else folder / FILE
        self._known = {
            "model": hash_weights(model.decoder.model),
            **model.decoder.computed,
            "seed": texts.seed,
            "protocol": PROTOCOL,
            "texts": [text.sha256 for text in (texts.calibration.windows, texts.quick, texts.whole, self._windows)],
        }
        self._kept: dict[str, Any] = self._read()
        self._order = Order(model.decoder, texts.quick, self._windows, texts.seed, progress)
        self._library: Library | None = None
        self.done: dict[str, Evaluation] = {}

    def base(self) -> Evaluation:
        """Evaluate the model itself."""
        return self._evaluated(Configuration("base", (), "none"))[0]

    def quick(self, configuration: Configuration) -> Evaluation:
        """Evaluate a configuration with a repair on little text."""
        with self._progress.doing(f"trying: {configuration.said}"):
            return self._evaluated(configuration)[0]

    def whole(self, configuration: Configuration) -> tuple[Evaluation, Model | None]:
        """Evaluate a configuration with the whole repair; return the model too, where it was made now."""
        return self._evaluated(configuration, whole=True)

    def made(self, configuration: Configuration, *, whole: bool = True) -> Model:
        """Build a configuration."""
        texts = self._texts
        windows = texts.whole if whole else texts.quick
        repair = None if configuration.repair == "none" else Repair(configuration.repair, windows)
        progress = self._progress if whole else SILENT
        base = self.model.copy()
        return apply(base, configuration.method, texts.calibration, texts.seed, texts.selection, progress, repair)[0]

    def without(self, number: int) -> Blocks | None:
        """Return the blocks to drop where a number of them goes, see `Order`; None where the order ends before."""
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

    def thinned(self, budget: int | Fast) -> Choice | None:
        """Return what each block keeps in the best model within a budget: see `Library.best`.

        None where the blocks cannot be thinned, where no choice meets the budget, or where the model is too large.

        Args:
            budget: the most parameters of the model, or a speed-up.
        """
        return self._chosen("thinned", budget, lambda library, limit: library.best(limit))

    def dropped(self, budget: int | Fast) -> Blocks | None:
        """Return the whole blocks to drop for a model within a budget; arguments and None as in `thinned`."""
        found = self._chosen("dropped", budget, lambda library, limit: library.dropped(limit))
        return None if found is None else tuple(index for index, shape in enumerate(found) if shape == GONE)

    def _chosen(
        self, name: str, budget: int | Fast, choose: Callable[[Library, Limit], Choice | None]
    ) -> Choice | None:
        decoder = self.model.decoder
        try:
            check(decoder)
        except InputError:
            return None
        if count(decoder) > _LARGEST[decoder.device.type != "cpu"]:
            return None
        said = f"{budget:,} parameters" if isinstance(budget, int) else f"a speed-up of {budget.speedup:g}"
        key = self._key(f"{name} for {said}" if isinstance(budget, int) else f"{name} for {budget}")
        if key not in self._kept:
            if self._library is None:
                text = beginning(self._texts.calibration.windows, _FITTED)
                self._library = Library(decoder, text, self._windows, self._progress)
            with self._progress.doing(f"choosing what blocks keep for {said}"):
                choice = choose(self._library, _limit(self._library, count(decoder), budget))
            self._keep(
                key, [[], []] if choice is None else [list(each) for each in zip(*map(astuple, choice), strict=True)]
            )
        heads, neurons = self._kept[key]
        return tuple(Shape(*both) for both in zip(heads, neurons, strict=True)) or None

    def clear(self) -> None:
        """Free the memory that `without` and `thinned` use; the next call makes their fits again."""
        self._order.clear()
        self._library = None

    def remembered(self, name: str, make: Callable[[], list[float]]) -> list[float]:
        """Return numbers that were made now or in an earlier run in this folder."""
        if (key := self._key(name)) not in self._kept:
            self._keep(key, make())
        found: list[float] = self._kept[key]
        return found

    def _evaluated(self, configuration: Configuration, *, whole: bool = False) -> tuple[Evaluation, Model | None]:
        key = self._key({"row": configuration.row, "whole": whole})
        made = None
        if key not in self._kept:
            made = self.made(configuration, whole=whole) if configuration.methods else self.model
            decoder = made.decoder
            tokens = (self._windows.lengths - self._windows.first_scored).double().numpy()
            mean = float(window_nats(decoder, self._windows).sum() / tokens.sum())
            counts = count(decoder), decoder.n_blocks, sum(decoder.d_ffn), sum(decoder.heads)
            self._keep(key, [number(mean), *counts, *astuple(weigh(decoder, self.model.saved_dtype))])
        nats, parameters, blocks, neurons, heads, *weighed = self._kept[key]
        perplexity = math.inf if nats is None else exponential(nats)
        self.done[key] = Evaluation(
            configuration, whole, parameters, blocks, neurons, heads, Weighed(*weighed), perplexity
        )
        return self.done[key], made

    def _key(self, what: Any) -> str:
        return hash_json({**self._known, "what": what})

    def _keep(self, key: str, value: Any) -> None:
        self._kept[key] = value
        if self._file is not None:
            write_text(self._file, json.dumps(self._kept, indent=0))

    def _read(self) -> dict[str, Any]:
        """Return what an interrupted run kept; nothing of a damaged file."""
        try:
            found = {} if self._file is None else json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {key: value for key, value in found.items() if _readable(value)} if isinstance(found, dict) else {}


def _limit(library: Library, parameters: int, budget: int | Fast) -> Limit:
    """Return what the blocks of a model may come to."""
    whole = Limit(0, library.sizes).of(library.whole)
    if isinstance(budget, int):
        return Limit(budget - parameters + whole, library.sizes)
    timed, each = budget.timed, whole / len(library.whole)
    costs = [{shape: timed.of(shape, size / each) for shape, size in sizes.items()} for sizes in library.sizes]
    return Limit(timed.left(budget.speedup), costs)


def _readable(value: Any) -> bool:
    """Whether a value is one that is kept: five or seven numbers, the first of which may be None, or sets of blocks."""
    if not isinstance(value, list) or len(value) < 2:
        return False
    if isinstance(value[0], list):
        return all(isinstance(blocks, list) and all(type(index) is int for index in blocks) for blocks in value)
    numbers = [type(each) in (int, float) for each in value]
    return len(value) in (5, 7) and (numbers[0] or value[0] is None) and all(numbers[1:])


def _growing(found: list[list[int]], blocks: int) -> bool:
    """Whether lists are sets of blocks, none and then one more each."""
    return found[:1] == [[]] and all(
        len(two) == number and set(one) < set(two) <= set(range(blocks))
        for number, (one, two) in enumerate(pairwise(found), 1)
    )
