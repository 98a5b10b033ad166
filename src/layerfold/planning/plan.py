"""Plan: under a budget, find what to do to a model, build it, and verify it on text that took no part."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from layerfold import defaults
from layerfold.calibration import Calibration, calibration_windows, shortage
from layerfold.checkpoint.model import Model, default_corpus
from layerfold.checkpoint.save import hash_weights
from layerfold.environment import environment
from layerfold.errors import InputError
from layerfold.evaluators import Perplexity
from layerfold.files import check_run_folder
from layerfold.inference.scoring import unit_nats
from layerfold.maths.intervals import Floats
from layerfold.methods import Drop
from layerfold.model.decoder import Decoder
from layerfold.planning.budget import Budget, read_budget
from layerfold.planning.candidates import Candidate, count, sizes
from layerfold.planning.front import Front
from layerfold.planning.results import Planned, Winner
from layerfold.planning.speed import Speeds, line, timed_beside
from layerfold.planning.trials import FILE, PROTOCOL, Texts, Trials
from layerfold.progress import SILENT, Progress
from layerfold.repair.regression import refittable
from layerfold.search.judging import describe, judged
from layerfold.search.stages import Blocks

_WINNER = (0,)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Find the best model within a budget.

    Candidates drop blocks, and remove as many neurons and heads of what is left as it takes to reach a size; beside
    them stands what each method by itself comes to at that size, as it is and repaired. All are repaired on little
    calibration text and scored on the selection text; the best of them are repaired once more on all of it, and the
    best of those is what the plan is. See `Front`.

    Attributes:
        parameters: how many distinct ones at most, as ``82M`` or ``66%``;
        speedup: or how many times as fast at least, as 1.5;
        perplexity: or how much higher at most, as ``+10%``.
        points: sizes between the budget's and the model's that are tried besides, to show the front.
        finalists: how many are repaired on all of the text.
        rivals: whether to try what each method by itself comes to.
        corpus: whose ``calibration``, ``validation`` and ``test`` splits calibrate, select and verify; None takes the
            model's own.
        calibration_tokens: what methods read activations from.
        repair_tokens: what repairs are fitted to, a quarter of it in trials.
        tokens, test_tokens: of the selection text, and of the test text.
        rounds: of the latency comparison; 0 times nothing, which a budget of speed does not admit.
        seed: orders the calibration documents.
    """

    parameters: str | int | None = None
    speedup: float | None = None
    perplexity: str | None = None
    points: int = 3
    finalists: int = 2
    rivals: bool = True
    corpus: str | None = None
    calibration_tokens: int = defaults.CALIBRATION_TOKENS
    repair_tokens: int = defaults.REPAIR_TOKENS
    tokens: int = defaults.SELECTION_TOKENS
    test_tokens: int = defaults.LIMIT_TOKENS
    rounds: int = 12
    seed: int = 0
    name: ClassVar[str] = "plan"

    def __post_init__(self) -> None:
        read_budget(self.parameters, self.speedup, self.perplexity)
        for name, least in (("points", 0), ("finalists", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} {getattr(self, name)}; accepted: {least} or more")
        if self.rounds != 0 and self.rounds < 3:
            raise InputError(f"rounds {self.rounds}; accepted: 0 (nothing is timed), or 3 or more")
        if self.speedup is not None and not self.rounds:
            raise InputError(f"rounds 0 with speedup {self.speedup}; accepted: 3 or more")

    def budget(self, decoder: Decoder) -> Budget:
        """Return the budget for a model.

        Raises:
            InputError: the model has no more than that, or a single block.
        """
        if decoder.n_blocks < 2:
            raise InputError(f"a plan for a model of {decoder.n_blocks} block; accepted: 2 blocks or more")
        for block in decoder.blocks:
            for part in ("ffn", "attention"):
                refittable(block, part)  # raises where a repair would fill zeros that are to stay
        whole = count(decoder)
        found = read_budget(self.parameters, self.speedup, self.perplexity, whole)
        # What is left of the first block with one neuron and no head, and of all that is no block.
        alone = sizes(decoder, [Drop(blocks=tuple(range(1, decoder.n_blocks)))])
        least = alone.parameters - alone.removable
        if found.kind == "parameters" and found.value < least:
            raise InputError(
                f"parameters {self.parameters!r} is {found.value:,.0f}; accepted: {least:,} ... {whole - 1:,}"
            )
        return found

    def __call__(
        self, model: Model, folder: Path | str | None = None, *, overwrite: bool = False, progress: Progress = SILENT
    ) -> tuple[Planned, Model]:
        """Plan, build and verify.

        Args:
            folder: keeps what was tried, so that an interrupted plan goes on; None keeps nothing.
            overwrite: write into a folder that holds something else; nothing in it is removed.

        Raises:
            InputError: a budget that the model does not admit, or that nothing tried meets.
            OutputError: a folder that holds something other than a plan.
        """
        folder = None if folder is None else Path(folder)
        if folder is not None:
            check_run_folder(folder, FILE, overwrite=overwrite)
        budget = self.budget(model.decoder)
        corpus = self.corpus or default_corpus(model)
        with progress.doing("reading text"):
            selection, test = (
                Perplexity(corpus=corpus, split=split, limit_tokens=tokens)
                for split, tokens in (("validation", self.tokens), ("test", self.test_tokens))
            )
            described = describe(selection, model), describe(test, model)
            calibration, quick, whole = (
                calibration_windows(model, corpus, tokens, self.seed)
                for tokens in (self.calibration_tokens, max(2, self.repair_tokens // 4), self.repair_tokens)
            )
        for windows, asked, doing in (
            (calibration, self.calibration_tokens, "calibration"),
            (whole, self.repair_tokens, "repair"),
        ):
            if said := shortage(windows, asked, doing):
                progress.note(said)
        texts = Texts(Calibration(model.decoder, calibration), quick, whole, selection, self.seed)
        trials = Trials(model, texts, folder, progress)
        chosen, made = self.find(trials, progress)
        windows = test.windows(model)
        nats: dict[Blocks, Floats] = {
            blocks: unit_nats(each.decoder, windows, progress, "measuring on test text")
            for blocks, each in (((), model), (_WINNER, made))
        }
        tests = judged(nats, windows.units.tokens)
        timings = timed_beside(model, made, self.rounds, progress) if self.rounds else (None, None)
        winner = Winner(
            candidate=chosen,
            trial=trials.whole(chosen)[0],
            test=tests[_WINNER],
            latency=timings[1],
        )
        planned = Planned(
            model=model.name,
            model_sha256=hash_weights(model.decoder.model),
            budget=budget,
            settings={"protocol": PROTOCOL, **asdict(self), "corpus": corpus},
            text=described[0],
            test_text=described[1],
            base=trials.base(),
            base_test=tests[()],
            base_latency=timings[0],
            trials=tuple(trials.done.values()),
            winner=winner,
            environment=environment(),
        )
        return planned, made

    def find(self, trials: Trials, progress: Progress = SILENT) -> tuple[Candidate, Model]:
        """Return the candidate that is the best within the budget, and the model that it makes.

        Raises:
            InputError: a budget that the model does not admit, or that nothing tried meets.
        """
        budget = self.budget(trials.model.decoder)
        timed = None
        if budget.kind == "speedup":
            machine = environment()
            kept = {"rounds": self.rounds, "threads": machine["threads"], "processor": machine["processor"]}
            depth, *each = trials.remembered(f"speeds {kept}", lambda: line(trials.model, self.rounds, progress))
            timed = Speeds(int(depth), *each)
        return Front(trials, budget, progress, timed, rivals=self.rivals).best(self.points, self.finalists, self.rounds)
