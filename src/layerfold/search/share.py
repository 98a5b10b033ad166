"""The search for the window of blocks that share their FFNs at the least cost."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from layerfold import defaults
from layerfold.calibration import Calibration, calibration_windows
from layerfold.checkpoint.model import Model, default_corpus
from layerfold.checkpoint.save import hash_weights
from layerfold.environment import environment
from layerfold.errors import InputError, one_of
from layerfold.evaluators import Perplexity
from layerfold.files import check_run_folder, hash_json, write_text
from layerfold.inference.spool import Apart
from layerfold.maths.intervals import exponential
from layerfold.methods import Share
from layerfold.methods.base import AUTO, Notes
from layerfold.model.decoder import Decoder
from layerfold.progress import SILENT, Progress
from layerfold.search.judging import describe, judged
from layerfold.search.results import FoundWindows, Window
from layerfold.search.scores import OBJECTIVES, Objective, Scores
from layerfold.search.selection import CHANCE, Selection
from layerfold.search.stages import Blocks, Replaced
from layerfold.text.windows import Windows

RESULT = "search.json"
PROTOCOL = "window-2"
_SCORES = "windows-*.safetensors"


@dataclass(frozen=True, kw_only=True)
class WindowSearch:
    """Find the window of blocks whose FFNs a model does best to share.

    Every window of so many consecutive blocks is shared as `share` says and scored. All of them are calibrated in one
    pass each over the text, for alignment and for the deltas, and what they have below the window is computed once.
    Memory holds the base and the deltas of one window at a time; those of the others are in temporary files.

    Attributes:
        k: number of consecutive blocks that share, as 4, or a range, as 2..6.
        share: how they share; its `window` is ``auto``, and its `k` is ignored.
        race: give up on windows that are clearly behind.
        objective: what windows are compared by; ``kl`` is the divergence from the whole model.
        corpus: text that calibrates, selects (validation split) and judges (test split); by default the model's own.
        calibration_tokens: calibration tokens.
        tokens: selection tokens.
        test_tokens: test tokens.
        context: length of the text's windows in tokens; by default the model's maximum, 2,048 at most.
        seed: orders the calibration documents, and the windows of a race.
    """

    k: tuple[int, int] = (4, 4)
    share: Share = field(default_factory=Share)
    race: bool = False
    objective: Objective = "perplexity"
    corpus: str | None = None
    calibration_tokens: int = defaults.CALIBRATION_TOKENS
    tokens: int = defaults.SELECTION_TOKENS
    test_tokens: int = defaults.LIMIT_TOKENS
    context: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise InputError(f"unknown objective {one_of(str(self.objective), OBJECTIVES)}")
        if self.share.window != AUTO:
            raise InputError(f"window {self.share.window!r} in a search for it; accepted: auto")
        if not 2 <= self.k[0] <= self.k[1]:
            raise InputError(f"k {self.k[0]}..{self.k[1]}; accepted: first..last with 2 <= first <= last")

    def __call__(
        self, model: Model, folder: Path | str | None = None, *, overwrite: bool = False, progress: Progress = SILENT
    ) -> FoundWindows:
        """Search.

        Args:
            folder: keeps what is measured, so that an interrupted search goes on, and gets the result; None keeps
                nothing.
            overwrite: write into a folder that holds something else; nothing in it is removed.

        Raises:
            InputError: settings that the model does not admit.
            OutputError: a folder that holds something other than a search.
        """
        folder = None if folder is None else Path(folder)
        if folder is not None:
            check_run_folder(folder, _SCORES, overwrite=overwrite)
        shares = [replace(self.share, k=k) for k in range(self.k[0], self.k[1] + 1)]
        admitted = {share.size: share.windows(model.decoder) for share in shares}
        corpus = self.corpus or default_corpus(model)
        with progress.doing("reading text"):
            selection, test = (
                Perplexity(corpus=corpus, split=split, context=self.context, limit_tokens=tokens)
                for split, tokens in (("validation", self.tokens), ("test", self.test_tokens))
            )
            texts = [describe(text, model) for text in (selection, test)]
            calibration = None
            if self.share.needs_calibration:
                text = calibration_windows(model, corpus, self.calibration_tokens, self.seed)
                calibration = Calibration(model.decoder, text, progress)
        # Of the weights as they are now: the decoder may have been edited since its hash was first asked for.
        sha256 = hash_weights(model.decoder.model)
        known = {
            "model": sha256,
            "calibration": None if calibration is None else calibration.windows.sha256,
            "protocol": PROTOCOL,
        }

        def scores(text: Perplexity, shares: list[Share], others: Mapping[Blocks, Apart]) -> Scores:
            cut = text.windows(model)
            settings = [share.resolved(model.decoder) for share in shares]
            key = hash_json({**known, "shares": settings, "windows": [*map(list, others)], "text": cut.sha256})
            file = None if folder is None else folder / f"windows-{key[:24]}.safetensors"
            divergence = text is selection
            return Scores(Replaced(model.decoder, others), cut, divergence=divergence, file=file, key=key)

        candidates: list[Window] = []
        best: dict[int, Window] = {}
        winners: dict[Blocks, Apart] = {}
        work: Counter[str] = Counter()
        eliminated = 0
        for share in shares:
            others = shared(share, admitted[share.size], model.decoder, calibration, progress)
            select = Selection(
                chosen_by := scores(selection, [share], others),
                self.objective,
                race=self.race,
                seed=self.seed,
                progress=progress,
                chance=CHANCE / len(shares),
            )
            first = select({share.size: list(others)}, 1)[share.size][0]
            chosen_by.measure([()], progress=progress, description="measuring the model as it is")
            candidates += [measured(chosen_by, blocks) for blocks in select.finished]
            best[share.size], winners[first] = measured(chosen_by, first), others[first]
            winners[first].own.stow()
            base = measured(chosen_by, ())
            work.update(scored_windows=select.scored, windows_of_all_candidates=select.all_windows)
            eliminated += select.given_up
        judge = scores(test, shares, winners)
        judge.measure([(), *winners], progress=progress, description="measuring the best on test text")
        found = FoundWindows(
            model=model.name,
            model_sha256=sha256,
            settings={
                "protocol": PROTOCOL,
                **{name: value for name, value in asdict(self).items() if name != "share"},
                "k": list(self.k),
                "corpus": corpus,
                "share": {name: value for name, value in asdict(self.share).items() if name not in ("window", "k")},
                "calibration_sha256": known["calibration"],
            },
            text=texts[0],
            test_text=texts[1],
            base=base,
            candidates=tuple(candidates),
            best=best,
            tests=judged({each: judge.unit_nats(each) for each in [(), *winners]}, judge.windows.units.tokens),
            eliminated=eliminated,
            work=dict(work),
            environment=environment(),
        )
        if folder is not None:
            write_text(folder / RESULT, json.dumps(found.to_json(), indent=1))
        return found


def shared(
    share: Share, windows: list[range], decoder: Decoder, calibration: Calibration | None, progress: Progress
) -> dict[Blocks, Apart]:
    """Share each window by itself, in a decoder that uses this one's parameters for the rest.

    What is made for a window waits in a temporary file until it is scored, so that memory holds one base at a time.
    """
    if calibration is not None:
        share.calibrate(calibration, windows)
    others = {}
    for window in progress.track(windows, f"sharing, windows of {share.size}", len(windows)):
        other = decoder.copy(share=True)
        share.at(window[0]).apply(other, calibration)
        others[tuple(window)] = Apart(other, decoder)
        others[tuple(window)].own.stow()
    return others


def best_window(
    share: Share, decoder: Decoder, calibration: Calibration | None, text: Windows, progress: Progress
) -> tuple[Share, Notes]:
    """Return the same for the window of `share.size` blocks that scores best on a text, and the perplexity of each."""
    others = shared(share, share.windows(decoder), decoder, calibration, progress)
    scores = Scores(Replaced(decoder, others), text, divergence=False)
    select = Selection(scores, "perplexity", race=False, seed=0, progress=progress)
    ((best, *_),) = select({share.size: list(others)}, 1).values()
    perplexities = {f"{each[0]}:{share.size}": measured(scores, each).perplexity for each in others}
    return share.at(best[0]), {"perplexity": perplexities}


def measured(scores: Scores, blocks: Blocks) -> Window:
    """Return a window's figures."""
    return Window(
        blocks,
        perplexity=exponential(scores.mean(blocks, "perplexity")),
        kl=scores.mean(blocks, "kl"),
        parameters=scores.parameters(blocks),
    )
