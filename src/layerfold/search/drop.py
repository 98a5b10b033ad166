"""The search for blocks to drop: chosen on selection text, judged on test text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

from layerfold import defaults
from layerfold.errors import InputError, one_of
from layerfold.maths.intervals import exponential
from layerfold.methods.drop import PARTS, Part
from layerfold.search.judging import check_rounds, judged, latency, time_depths
from layerfold.search.repaired import Repairs
from layerfold.search.results import Candidate, Found
from layerfold.search.run import Search, SearchRun
from layerfold.search.scores import Objective, Scores
from layerfold.search.selection import STRATEGIES, Selection, Strategy, beam, check_number, exhaustive
from layerfold.search.stages import Blocks, Lacking, removable

PROTOCOL = "drop-2"
DropObjective = Literal["perplexity", "kl", "repaired"]
DROP_OBJECTIVES: tuple[DropObjective, ...] = get_args(DropObjective)


@dataclass(frozen=True, kw_only=True)
class DropSearch(Search[Found]):
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

    marker: ClassVar[str] = "scores-*.safetensors"
    remove: tuple[int, int] | None = (1, 1)
    part: Part = "block"
    strategy: Strategy = "exhaustive"
    width: int = 8
    race: bool = False
    objective: DropObjective = "perplexity"
    finalists: int = 4
    calibration_tokens: int = defaults.REPAIR_TOKENS
    context: int | None = None
    rounds: int = 12

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
        check_rounds(self.rounds)

    def _found(self, run: SearchRun) -> Found:
        decoder, progress = run.model.decoder, run.progress
        indices = removable(decoder, self.part)
        counts = self._counts(decoder.n_blocks, len(indices))
        check_number(self.strategy, self.width, len(indices), counts)
        selection, test = run.read(self.context)
        lacking = Lacking(decoder, self.part)
        known: dict[str, Any] = {"part": self.part, "protocol": PROTOCOL}
        on_test = run.scores(lacking, test, known, divergence=False)
        repairs = None
        if self.objective == "repaired":
            repairs = Repairs(decoder, *run.repair_texts(self.calibration_tokens), progress)
            known |= {"repair": repairs.known}
            quick = known | {"most": counts[-1]}
            scores = run.scores(repairs.stages(counts[-1]), selection, quick, divergence=True)
        else:
            scores = run.scores(lacking, selection, known, divergence=True)
        objective: Objective = "kl" if self.objective == "kl" else "perplexity"
        select = Selection(scores, objective, race=self.race, seed=self.seed, progress=progress)
        finalists = self._finalists(select, indices, counts)
        scores.measure([()], progress=progress, description="measuring the model as it is")
        if repairs is None:
            chosen, best = scores, {count: first for count, (first, *_) in finalists.items()}
            nats = run.judge(on_test, best.values())
        else:
            # Whole repairs do not depend on the largest number removed.
            chosen, judge = (run.scores(repairs.edited, text, known, divergence=False) for text in (selection, test))
            best = {count: repairs.best(candidates, chosen, judge) for count, candidates in finalists.items()}
            nats = run.judge(on_test, []) | {removed: judge.unit_nats(removed) for removed in best.values()}
        timings = {}
        if self.rounds:
            timings = time_depths(run.model, run.sha256, self.part, list(best), self.rounds, run.folder, progress)

        def measured(removed: Blocks, scores: Scores) -> Candidate:
            kl = scores.mean(removed, "kl")
            return Candidate(
                removed,
                perplexity=exponential(scores.mean(removed, "perplexity")),
                kl=math.nan if math.isnan(kl) else kl,  # one object: a candidate is equal to itself, measured again
                parameters=on_test.parameters(removed),  # not of repairs of one block each, which untie FFNs
                blocks=decoder.n_blocks - (len(removed) if self.part == "block" else 0),
            )

        found = Found(
            **run.header,
            settings={
                "protocol": PROTOCOL,
                **asdict(self),
                "remove": [counts[0], counts[-1]],
                "corpus": run.corpus,
                "latency": latency(run.model, self.rounds).settings(run.model) if self.rounds else None,
                "repair": None if repairs is None else repairs.known,
            },
            parts=len(indices),
            base=measured((), scores),
            candidates=tuple(measured(removed, scores) for removed in select.finished if len(removed) in counts),
            best={count: measured(removed, chosen) for count, removed in best.items()},
            tests=judged(nats, test.units.tokens),
            timings=timings,
            eliminated=select.given_up,
            work=select.work,
        )
        return run.written(found)

    def _finalists(self, select: Selection, indices: Sequence[int], counts: range) -> dict[int, list[Blocks]]:
        """Choose the best candidates of each number removed: several where repairs choose among them, else one."""
        keep = self.finalists if self.objective == "repaired" else 1
        if self.strategy == "exhaustive":
            return exhaustive(select, indices, counts, keep)
        return beam(select, indices, counts, keep, 1 if self.strategy == "greedy" else self.width)

    def _counts(self, n_blocks: int, there: int) -> range:
        """Return the numbers to remove, of as many as are there."""
        most = there - (self.part == "block")
        if most < 1:
            raise InputError(f"a model of depth {n_blocks} with {there} {self.part}s: there is none to remove")
        first, last = self.remove or (1, most)
        if last > most:
            raise InputError(f"remove {first}..{last} for a model of depth {n_blocks}; accepted: 1 ... {most}")
        return range(first, last + 1)
