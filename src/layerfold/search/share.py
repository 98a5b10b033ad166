"""The search for the window of blocks that share their FFNs at the least cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import ClassVar

from layerfold import defaults
from layerfold.calibration import Calibration
from layerfold.errors import InputError, one_of
from layerfold.inference.spool import Apart
from layerfold.maths.intervals import exponential
from layerfold.methods import Share
from layerfold.methods.base import AUTO, Notes
from layerfold.model.decoder import Decoder
from layerfold.progress import Progress
from layerfold.search.judging import judged
from layerfold.search.results import FoundWindows, Window
from layerfold.search.run import Search, SearchRun
from layerfold.search.scores import OBJECTIVES, Objective, Scores
from layerfold.search.selection import CHANCE, Selection
from layerfold.search.stages import Blocks, Replaced
from layerfold.text.windows import TokenWindows

PROTOCOL = "window-2"


@dataclass(frozen=True, kw_only=True)
class WindowSearch(Search[FoundWindows]):
    """Find the window of blocks whose FFNs a model does best to share.

    Every window of k consecutive blocks is shared as `share` says and scored. One pass over the text for alignment and
    one for the deltas calibrate all of them, and what they have below the window is computed once. Memory holds the
    base and the deltas of one window at a time; those of the others are in temporary files.

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

    marker: ClassVar[str] = "windows-*.safetensors"
    k: tuple[int, int] = (4, 4)
    share: Share = field(default_factory=Share)
    race: bool = False
    objective: Objective = "perplexity"
    calibration_tokens: int = defaults.CALIBRATION_TOKENS
    context: int | None = None

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise InputError(f"unknown objective {one_of(str(self.objective), OBJECTIVES)}")
        if self.share.window != AUTO:
            raise InputError(f"window {self.share.window!r} in a search for it; accepted: auto")
        if not 2 <= self.k[0] <= self.k[1]:
            raise InputError(f"k {self.k[0]}..{self.k[1]}; accepted: first..last with 2 <= first <= last")

    def _found(self, run: SearchRun) -> FoundWindows:
        decoder, progress = run.model.decoder, run.progress
        shares = [replace(self.share, k=k) for k in range(self.k[0], self.k[1] + 1)]
        admitted = {share.size: share.windows(decoder) for share in shares}
        selection, test = run.read(self.context)
        calibration = None
        if self.share.needs_calibration:
            calibration = Calibration(decoder, run.calibration(self.calibration_tokens), progress)
        calibrated_by = None if calibration is None else calibration.windows.sha256

        def scores(text: TokenWindows, shares: list[Share], others: Mapping[Blocks, Apart]) -> Scores:
            known = {
                "calibration": calibrated_by,
                "protocol": PROTOCOL,
                "shares": [share.resolved(decoder) for share in shares],
                "windows": [*map(list, others)],
            }
            return run.scores(Replaced(decoder, others), text, known, divergence=text is selection)

        candidates: list[Window] = []
        best: dict[int, Window] = {}
        winners: dict[Blocks, Apart] = {}
        work: Counter[str] = Counter()
        eliminated = 0
        for share in shares:
            others = shared(share, admitted[share.size], decoder, calibration, progress)
            select = Selection(
                chosen_by := scores(selection, [share], others),
                self.objective,
                race=self.race,
                seed=self.seed,
                progress=progress,
                chance=CHANCE / len(shares),
            )
            first = select.best(list(others))
            chosen_by.measure([()], progress=progress, description="measuring the model as it is")
            candidates += [measured(chosen_by, blocks) for blocks in select.finished]
            best[share.size], winners[first] = measured(chosen_by, first), others[first]
            winners[first].own.stow()
            base = measured(chosen_by, ())
            work.update(select.work)
            eliminated += select.given_up
        nats = run.judge(scores(test, shares, winners), winners)
        found = FoundWindows(
            **run.header,
            settings={
                "protocol": PROTOCOL,
                **{name: value for name, value in asdict(self).items() if name != "share"},
                "k": list(self.k),
                "corpus": run.corpus,
                "share": {name: value for name, value in asdict(self.share).items() if name not in ("window", "k")},
                "calibration_sha256": calibrated_by,
            },
            base=base,
            candidates=tuple(candidates),
            best=best,
            tests=judged(nats, test.units.tokens),
            eliminated=eliminated,
            work=dict(work),
        )
        return run.written(found)


def shared(
    share: Share, windows: list[range], decoder: Decoder, calibration: Calibration | None, progress: Progress
) -> dict[Blocks, Apart]:
    """Share each window by itself, in a decoder that uses this one's parameters for the rest.

    What is made for a window waits in a temporary file until it is scored, so that memory holds one base at a time.
    """
    if calibration is not None:
        share.calibrate(calibration, windows)
    others: dict[Blocks, Apart] = {}
    for window in progress.track(windows, f"sharing, windows of {share.size}", len(windows)):
        other = decoder.copy(share=True)
        share.at(window[0]).apply(other, calibration)
        others[tuple(window)] = apart = Apart(other, decoder)
        apart.own.stow()
    return others


def best_window(
    share: Share, decoder: Decoder, calibration: Calibration | None, text: TokenWindows, progress: Progress
) -> tuple[Share, Notes]:
    """Return the same for the window of `share.size` blocks that scores best on a text.

    Windows race (see `Selection`). The notes have the perplexity of each that was scored on all of the text.
    """
    others = shared(share, share.windows(decoder), decoder, calibration, progress)
    scores = Scores(Replaced(decoder, others), text, divergence=False)
    select = Selection(scores, "perplexity", race=True, seed=0, progress=progress)
    best = select.best(list(others))
    perplexities = {f"{each[0]}:{share.size}": measured(scores, each).perplexity for each in select.finished}
    return share.at(best[0]), {"perplexity": perplexities}


def measured(scores: Scores, blocks: Blocks) -> Window:
    """Return a window's figures."""
    return Window(
        blocks,
        perplexity=exponential(scores.mean(blocks, "perplexity")),
        kl=scores.mean(blocks, "kl"),
        parameters=scores.parameters(blocks),
    )
