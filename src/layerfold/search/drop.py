"""The search for blocks to drop: candidates chosen on selection text, the chosen ones measured on test text."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from layerfold import defaults
from layerfold.calibration import calibration_windows, shortage
from layerfold.checkpoint.model import Model, default_corpus
from layerfold.checkpoint.save import hash_weights
from layerfold.environment import environment
from layerfold.errors import InputError, one_of
from layerfold.evaluators import Perplexity
from layerfold.files import check_run_folder, hash_json, write_text
from layerfold.maths.intervals import Floats, exponential
from layerfold.methods.drop import PARTS, Part
from layerfold.progress import SILENT, Progress
from layerfold.search.judging import describe, judged, latency, time_depths
from layerfold.search.repaired import Repairs
from layerfold.search.results import Candidate, Found
from layerfold.search.scores import Objective, Scores
from layerfold.search.selection import STRATEGIES, Selection, Strategy, beam, check_number, exhaustive
from layerfold.search.stages import Blocks, Lacking, Stages, removable
from layerfold.text.windows import Windows

RESULT = "search.json"
PROTOCOL = "drop-2"
DropObjective = Literal["perplexity", "kl", "repaired"]
DROP_OBJECTIVES: tuple[DropObjective, ...] = get_args(DropObjective)
_SCORES = "scores-*.safetensors"


@dataclass(frozen=True, kw_only=True)
class DropSearch:
    """Find the blocks that a model does best without.

    `remove` is the first and last of a range; None tries every number that leaves a block. A race is faster by far, but
    lists only the candidates that ran to the end (see `selection.Selection`). The objective ``kl`` is the divergence
    from the whole model. For ``repaired`` (see `Repairs`) candidates are ranked with each block refitted by itself,
    from moments that serve all of them; the best of each number are ranked once more after the whole repair.

    Attributes:
        remove: number of blocks to remove, as 2, or a range, as 1..3.
        part: remove the blocks themselves, or only their attention or FFN.
        strategy: try all sets of each size, or extend the best set (``greedy``) or the best `width` sets (``beam``) by
            one block.
        width: number of sets of each size that ``beam`` extends.
        race: give up on candidates that are clearly behind.
        objective: what candidates are compared by; ``repaired`` is the perplexity after a repair.
        finalists: with ``repaired``, the number of candidates of each size that are repaired on all of the text.
        corpus: text that selects (validation split), judges (test split) and repairs (calibration split); by default
            the model's own.
        tokens: selection tokens.
        test_tokens: test tokens.
        calibration_tokens: with ``repaired``, the calibration tokens of a whole repair; quick repairs read a quarter.
        context: length of the text's windows in tokens; by default the model's maximum, 2,048 at most.
        rounds: rounds of the latency comparison; 0 times nothing.
        seed: orders the windows of a race, and the calibration documents.
    """

    remove: tuple[int, int] | None = (1, 1)
    part: Part = "block"
    strategy: Strategy = "exhaustive"
    width: int = 8
    race: bool = False
    objective: DropObjective = "perplexity"
    finalists: int = 4
    corpus: str | None = None
    tokens: int = defaults.SELECTION_TOKENS
    test_tokens: int = defaults.LIMIT_TOKENS
    calibration_tokens: int = defaults.REPAIR_TOKENS
    context: int | None = None
    rounds: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        for name, accepted in (("part", PARTS), ("strategy", STRATEGIES), ("objective", DROP_OBJECTIVES)):
            if getattr(self, name) not in accepted:
                raise InputError(f"unknown {name} {one_of(str(getattr(self, name)), accepted)}")
        if self.remove is not None and not 1 <= self.remove[0] <= self.remove[1]:
            raise InputError(
                f"remove {self.remove[0]}..{self.remove[1]}; accepted: first..last with 1 <= first <= last"
            )
        for name in ("width", "finalists"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}; accepted: 1 or more")
        if self.objective == "repaired" and self.part != "block":
            raise InputError(f"objective 'repaired' with part {self.part!r}; accepted: block")
        if self.rounds != 0 and self.rounds < 3:
            raise InputError(f"rounds {self.rounds}; accepted: 0 (nothing is timed), or 3 or more")

    def __call__(
        self, model: Model, folder: Path | str | None = None, *, overwrite: bool = False, progress: Progress = SILENT
    ) -> Found:
        """Search.

        Args:
            folder: keeps what is measured, so that an interrupted search goes on, and gets the result; None keeps
                nothing.
            overwrite: write into a folder that holds something else; nothing in it is removed.

        Raises:
            InputError: a number to remove that the model does not admit, too many candidates, a context too long.
            OutputError: a folder that holds something other than a search.
        """
        folder = None if folder is None else Path(folder)
        if folder is not None:
            check_run_folder(folder, _SCORES, overwrite=overwrite)
        indices = removable(model.decoder, self.part)
        counts = self._counts(model.decoder.n_blocks, len(indices))
        check_number(self.strategy, self.width, len(indices), counts)
        corpus = self.corpus or default_corpus(model)
        with progress.doing("reading text"):
            selection, test = (
                Perplexity(corpus=corpus, split=split, context=self.context, limit_tokens=tokens)
                for split, tokens in (("validation", self.tokens), ("test", self.test_tokens))
            )
            texts = [describe(text, model) for text in (selection, test)]
        # Of the weights as they are now: the decoder may have been edited since its hash was first asked for.
        sha256 = hash_weights(model.decoder.model)
        windows, test_windows = selection.windows(model), test.windows(model)
        known: dict[str, Any] = {"model": sha256, "part": self.part, "protocol": PROTOCOL}
        stages: Stages = Lacking(model.decoder, self.part)
        test_scores = _open(stages, test_windows, known, folder, divergence=False)
        repairs = self._repairs(model, corpus, progress)
        if repairs is not None:
            stages, known = repairs.stages(counts[-1]), known | {"repair": repairs.known, "most": counts[-1]}
        scores = _open(stages, windows, known, folder, divergence=True)
        finalists, select = self._finalists(scores, indices, counts, progress)
        test_scores.measure([()], progress=progress, description="measuring the model on test text")
        nats: dict[Blocks, Floats] = {}
        tests: dict[Blocks, Floats] = {(): test_scores.unit_nats(())}
        if repairs is None:
            best = {count: each[0] for count, each in finalists.items()}
            test_scores.measure(best.values(), progress=progress, description="measuring the best on test text")
            tests |= {removed: test_scores.unit_nats(removed) for removed in best.values()}
        else:
            # Whole repairs are the same whatever else was asked for.
            wholly = {key: value for key, value in known.items() if key != "most"}
            chosen = _open(repairs.edited, windows, wholly, folder, divergence=False)
            on_test = _open(repairs.edited, test_windows, wholly, folder, divergence=False)
            best = {count: repairs.best(each, chosen, on_test) for count, each in finalists.items()}
            nats |= {removed: chosen.values(removed, "perplexity") for removed in best.values()}
            tests |= {removed: on_test.unit_nats(removed) for removed in best.values()}
        timings = {}
        if self.rounds:
            timings = time_depths(model, sha256, self.part, list(best), self.rounds, folder, progress)

        def measured(removed: Blocks) -> Candidate:
            return Candidate(
                removed,
                blocks=model.decoder.n_blocks - (len(removed) if self.part == "block" else 0),
                perplexity=exponential(scores.mean(removed, "perplexity")),
                kl=scores.mean(removed, "kl"),
                parameters=test_scores.parameters(removed),  # not of repairs of one block each, which untie FFNs
            )

        def repaired(removed: Blocks) -> Candidate:
            """A winner after the whole repair, of which the divergence is not measured."""
            perplexity = exponential(float(nats[removed].sum() / scores.tokens.sum()))
            return replace(measured(removed), perplexity=perplexity, kl=math.nan)

        found = Found(
            model=model.name,
            model_sha256=sha256,
            settings={
                "protocol": PROTOCOL,
                **asdict(self),
                "remove": [counts[0], counts[-1]],
                "corpus": corpus,
                "latency": latency(model, self.rounds).settings(model) if self.rounds else None,
                "repair": None if repairs is None else repairs.known,
            },
            text=texts[0],
            test_text=texts[1],
            parts=len(indices),
            base=measured(()),
            candidates=tuple(measured(removed) for removed in select.finished if len(removed) in counts),
            best={count: repaired(each) if each in nats else measured(each) for count, each in best.items()},
            tests=judged(tests, test_windows.units.tokens),
            timings=timings,
            eliminated=select.given_up,
            work={"scored_windows": select.scored, "windows_of_all_candidates": select.all_windows},
            environment=environment(),
        )
        if folder is not None:
            write_text(folder / RESULT, json.dumps(found.to_json(), indent=1))
        return found

    def _repairs(self, model: Model, corpus: str, progress: Progress) -> Repairs | None:
        if self.objective != "repaired":
            return None
        text, quick = (
            calibration_windows(model, corpus, tokens, self.seed)
            for tokens in (self.calibration_tokens, max(2, self.calibration_tokens // 4))
        )
        if said := shortage(text, self.calibration_tokens, "repair"):
            progress.note(said)
        return Repairs(model.decoder, text, quick, progress)

    def _finalists(
        self, scores: Scores, indices: Sequence[int], counts: range, progress: Progress
    ) -> tuple[dict[int, list[Blocks]], Selection]:
        """Choose among candidates; return the best of each number, one where none is repaired."""
        objective: Objective = "kl" if self.objective == "kl" else "perplexity"
        select = Selection(scores, objective, race=self.race, seed=self.seed, progress=progress)
        keep = self.finalists if self.objective == "repaired" else 1
        if self.strategy == "exhaustive":
            finalists = exhaustive(select, indices, counts, keep)
        else:
            finalists = beam(select, indices, counts, keep, 1 if self.strategy == "greedy" else self.width)
        scores.measure([()], progress=progress, description="measuring the model as it is")
        return finalists, select

    def _counts(self, n_blocks: int, there: int) -> range:
        """Return the numbers to remove, of as many as are there."""
        most = there - (self.part == "block")
        if most < 1:
            raise InputError(f"a model of depth {n_blocks} with {there} {self.part}s: there is none to remove")
        first, last = self.remove or (1, most)
        if last > most:
            raise InputError(f"remove {first}..{last} for a model of depth {n_blocks}; accepted: 1 ... {most}")
        return range(first, last + 1)


def _open(stages: Stages, windows: Windows, known: dict[str, Any], folder: Path | None, *, divergence: bool) -> Scores:
    key = hash_json({**known, "text": windows.sha256})
    file = None if folder is None else folder / f"scores-{key[:24]}.safetensors"
    return Scores(stages, windows, divergence=divergence, file=file, key=key)
