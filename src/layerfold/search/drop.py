"""The search for blocks to drop: candidates chosen on selection text, the chosen ones measured on test text."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from layerfold import defaults
from layerfold.checkpoint import hash_weights
from layerfold.errors import InputError, one_of
from layerfold.evaluators import Perplexity
from layerfold.folders import check_run_folder
from layerfold.hub import Model, default_corpus
from layerfold.methods.drop import PARTS, Part
from layerfold.progress import SILENT, Progress
from layerfold.records import environment, hash_json, write_text
from layerfold.search.found import Candidate, Found
from layerfold.search.judging import describe, judged
from layerfold.search.scores import OBJECTIVES, Objective, Scores
from layerfold.search.selection import Selection
from layerfold.search.stages import Blocks, Lacking, removable
from layerfold.search.strategies import STRATEGIES, Strategy, beam, check_number, exhaustive
from layerfold.search.timing import latency, time_depths
from layerfold.statistics import exponential

RESULT = "search.json"
PROTOCOL = "drop-1"
_SCORES = "scores-*.safetensors"


@dataclass(frozen=True, kw_only=True)
class DropSearch:
    """Find the blocks that a model does best without.

    Attributes:
        remove: how many to remove, first and last of a range; None for every number that leaves a block.
        part: ``block``, or ``attention`` or ``ffn`` to remove only that of a block.
        strategy: ``exhaustive`` looks at all sets of a size, ``greedy`` and ``beam`` at those that add one to the
            best set, or to the best `width` sets, of the size below.
        width: of the beam.
        race: give up on a candidate as soon as others are clearly better: faster by far, but only those that ran to
            the end are listed. See `selection.by_race`.
        objective: ``perplexity``, or ``kl``, the divergence from the model as it is.
        corpus: whose ``validation`` split selects and whose ``test`` split judges; None takes the model's own.
        tokens, test_tokens: of the two.
        context: window length; None takes the model's maximum, 2,048 at most.
        rounds: of the latency comparison; 0 times nothing.
        seed: orders the windows of a race.
    """

    remove: tuple[int, int] | None = (1, 1)
    part: Part = "block"
    strategy: Strategy = "exhaustive"
    width: int = 8
    race: bool = False
    objective: Objective = "perplexity"
    corpus: str | None = None
    tokens: int = defaults.SELECTION_TOKENS
    test_tokens: int = defaults.LIMIT_TOKENS
    context: int | None = None
    rounds: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        for name, accepted in (("part", PARTS), ("strategy", STRATEGIES), ("objective", OBJECTIVES)):
            if getattr(self, name) not in accepted:
                raise InputError(f"unknown {name} {one_of(str(getattr(self, name)), accepted)}")
        if self.remove is not None and not 1 <= self.remove[0] <= self.remove[1]:
            raise InputError(
                f"remove {self.remove[0]}..{self.remove[1]}; accepted: first..last with 1 <= first <= last"
            )
        if self.width < 1:
            raise InputError(f"width {self.width}; accepted: 1 or more")
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
        scores, test_scores = (
            _open(model, sha256, text, self.part, folder, divergence=text is selection) for text in (selection, test)
        )
        select = Selection(scores, self.objective, race=self.race, seed=self.seed, progress=progress)
        if self.strategy == "exhaustive":
            best = exhaustive(select, indices, counts)
        else:
            best = beam(select, indices, counts, 1 if self.strategy == "greedy" else self.width)
        scores.measure([()], progress=progress, description="measuring the model as it is")
        winners = [(), *best.values()]
        test_scores.measure(winners, progress=progress, description="measuring the best on test text")
        timings = {}
        if self.rounds:
            timings = time_depths(model, sha256, self.part, list(best), self.rounds, folder, progress)

        def measured(removed: Blocks) -> Candidate:
            return Candidate(
                removed,
                blocks=model.decoder.n_blocks - (len(removed) if self.part == "block" else 0),
                perplexity=exponential(scores.mean(removed, "perplexity")),
                kl=scores.mean(removed, "kl"),
                parameters=scores.parameters(removed),
            )

        found = Found(
            model=model.name,
            model_sha256=sha256,
            settings={
                "protocol": PROTOCOL,
                **asdict(self),
                "remove": [counts[0], counts[-1]],
                "corpus": corpus,
                "latency": latency(model, self.rounds).settings(model) if self.rounds else None,
            },
            text=texts[0],
            test_text=texts[1],
            parts=len(indices),
            base=measured(()),
            candidates=tuple(measured(removed) for removed in select.finished if len(removed) in counts),
            best={count: measured(removed) for count, removed in best.items()},
            tests=judged(test_scores, winners),
            timings=timings,
            eliminated=select.given_up,
            work={"scored_windows": select.scored, "windows_of_all_candidates": select.all_windows},
            environment=environment(),
        )
        if folder is not None:
            write_text(folder / RESULT, json.dumps(found.to_json(), indent=1))
        return found

    def _counts(self, n_blocks: int, there: int) -> range:
        """Return the numbers to remove, of as many as are there."""
        most = there - (self.part == "block")
        if most < 1:
            raise InputError(f"a model of depth {n_blocks} with {there} {self.part}s: there is none to remove")
        first, last = self.remove or (1, most)
        if last > most:
            raise InputError(f"remove {first}..{last} for a model of depth {n_blocks}; accepted: 1 ... {most}")
        return range(first, last + 1)


def _open(model: Model, sha256: str, text: Perplexity, part: Part, folder: Path | None, *, divergence: bool) -> Scores:
    windows = text.windows(model)
    key = hash_json({"model": sha256, "part": part, "text": windows.sha256, "protocol": PROTOCOL})
    file = None if folder is None else folder / f"scores-{key[:24]}.safetensors"
    return Scores(Lacking(model.decoder, part), windows, divergence=divergence, file=file, key=key)
