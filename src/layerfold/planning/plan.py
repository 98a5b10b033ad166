"""Plan: find the best model within a budget, build it, and verify it on text that took no part in the choice."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

from layerfold import defaults
from layerfold.calibration import Calibration
from layerfold.checkpoint.model import Model
from layerfold.checkpoint.weighing import dense_parameters
from layerfold.checkpoint.weighing import parameters as count
from layerfold.environment import environment
from layerfold.errors import InputError
from layerfold.inference.scoring import unit_nats
from layerfold.maths.intervals import Floats
from layerfold.methods import Drop
from layerfold.methods.prune import units
from layerfold.model.block import PARTS
from layerfold.model.decoder import Decoder
from layerfold.model.outputs import refittable
from layerfold.planning.budget import Budget, read_budget
from layerfold.planning.candidates import sizes
from layerfold.planning.front import Front
from layerfold.planning.results import Planned, Winner
from layerfold.planning.speed import Speeds, line, timed_beside
from layerfold.planning.trials import FILE, PROTOCOL, Evaluation, Texts, Trials
from layerfold.progress import SILENT, Progress
from layerfold.search.judging import check_rounds, judged
from layerfold.search.run import Search, SearchRun
from layerfold.search.stages import Blocks

_WINNER = (0,)
_MULTIPLE = 64
_QUICK = 8
"""A trial's repair reads so large a part of the repair tokens: one eighth."""


@dataclass(frozen=True, kw_only=True)
class Plan(Search[tuple[Planned, Model]]):
    """Find the best model within a budget.

    A plan tries mixtures of removed blocks, neurons and heads, and every method by itself, with and without repair.
    Trials are repaired on little calibration text and scored on the selection text; the best are repaired once more on
    all of the calibration text, and the best of those wins. See `Front`.

    Attributes:
        parameters: largest number of distinct parameters, as ``82M``, or their percentage, as ``66%``.
        speedup: instead of `parameters`, the least speed-up, as 1.5.
        perplexity: instead of `parameters`, the largest rise of perplexity, as ``+10%``.
        points: with `parameters`, sizes between the budget and the whole model that are tried too.
        finalists: number of the best candidates that are repaired on all of the text.
        rivals: try what each method by itself comes to.
        uniform: leave each block as many neurons and heads, so that the dense checkpoint is as small as the compact
            one. Heads go only if the configuration says their number.
        multiple_of: with `uniform`, the number of neurons that an FFN keeps is a multiple of this.
        corpus: text that calibrates, selects (validation split) and verifies (test split); by default the model's own.
        calibration_tokens: calibration tokens that methods read activations from.
        repair_tokens: calibration tokens that repairs are fitted to; trials read an eighth.
        tokens: selection tokens.
        test_tokens: test tokens.
        rounds: rounds of the latency comparison; 0 times nothing.
        seed: orders the calibration documents.
    """

    parameters: str | int | None = None
    speedup: float | None = None
    perplexity: str | None = None
    points: int = 3
    finalists: int = 2
    rivals: bool = True
    uniform: bool = False
    multiple_of: int = _MULTIPLE
    calibration_tokens: int = defaults.CALIBRATION_TOKENS
    repair_tokens: int = defaults.REPAIR_TOKENS
    rounds: int = 12
    name: ClassVar[str] = "plan"
    marker: ClassVar[str] = FILE

    def __post_init__(self) -> None:
        read_budget(self.parameters, self.speedup, self.perplexity)
        for name, least in (("points", 0), ("finalists", 1), ("multiple_of", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} {getattr(self, name)}; accepted: {least} or more")
        if self.multiple_of != _MULTIPLE and not self.uniform:
            raise InputError(f"multiple_of {self.multiple_of}; accepted: with uniform")
        check_rounds(self.rounds)
        if self.speedup is not None and not self.rounds:
            raise InputError(f"rounds 0 with speedup {self.speedup}; accepted: 3 or more")

    def budget(self, decoder: Decoder) -> Budget:
        """Return the budget for a model.

        Raises:
            InputError: the model is within the budget already, or has a single block.
        """
        if decoder.n_blocks < 2:
            raise InputError(f"a plan for a model of {decoder.n_blocks} block; accepted: 2 blocks or more")
        for index in range(decoder.n_blocks):
            for part in PARTS:
                refittable(decoder, index, part)  # raises where a repair would fill zeros that are to stay
        if self.uniform:
            units.check_equal(decoder)
            if dense_parameters(decoder) > count(decoder):
                raise InputError(
                    "uniform, of a model whose blocks lack or share something; accepted: blocks of their own"
                )
        whole = count(decoder)
        found = read_budget(self.parameters, self.speedup, self.perplexity, whole)
        # The first block with one neuron and no head, and everything outside the blocks.
        alone = sizes(decoder, [Drop(blocks=tuple(range(1, decoder.n_blocks)))])
        least = alone.parameters - alone.removable
        if found.kind == "parameters" and found.value < least:
            raise InputError(
                f"parameters {self.parameters!r} is {found.value:,.0f}; accepted: {least:,} ... {whole - 1:,}"
            )
        return found

    def _found(self, run: SearchRun) -> tuple[Planned, Model]:
        model, progress = run.model, run.progress
        budget = self.budget(model.decoder)
        _, test = run.read()
        calibration = Calibration(model.decoder, run.calibration(self.calibration_tokens, "calibration"))
        whole, quick = run.repair_texts(self.repair_tokens, _QUICK)
        texts = Texts(calibration, quick, whole, run.selection_text, self.seed)
        trials = Trials(model, texts, run.folder, progress)
        trial, made = self.find(trials, progress)
        nats: dict[Blocks, Floats] = {
            blocks: unit_nats(tested.decoder, test, progress, "measuring on test text")
            for blocks, tested in (((), model), (_WINNER, made))
        }
        tests = judged(nats, test.units.tokens)
        timings = timed_beside(model, made, self.rounds, progress) if self.rounds else (None, None)
        planned = Planned(
            **run.header,
            settings={"protocol": PROTOCOL, **asdict(self), "corpus": run.corpus},
            budget=budget,
            base=trials.base(),
            base_test=tests[()],
            base_latency=timings[0],
            trials=tuple(trials.done.values()),
            winner=Winner(trial, tests[_WINNER], timings[1]),
        )
        return planned, made

    def find(self, trials: Trials, progress: Progress = SILENT) -> tuple[Evaluation, Model]:
        """Return the best trial within the budget, and its model.

        Raises:
            InputError: a budget that the model does not admit, or that nothing tried meets.
        """
        budget = self.budget(trials.model.decoder)
        timed = None
        if budget.kind == "speedup":
            machine = environment()
            kept = {"rounds": self.rounds, "threads": machine["threads"], "processor": machine["processor"]}
            kept |= trials.model.decoder.computed
            depth, *slopes = trials.remembered(f"speeds {kept}", lambda: line(trials.model, self.rounds, progress))
            timed = Speeds(int(depth), *slopes)
        alike: list[int | None] = [None, self.multiple_of]
        chosen, beside = reversed(alike) if self.uniform else alike
        front = Front(trials, budget, progress, timed, rivals=self.rivals, multiple_of=chosen, beside=beside)
        return front.best(self.points, self.finalists, self.rounds)
