"""The search for a window of blocks to share, against calibrating, sharing and scoring each window from scratch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from shape import (
    CONTEXT,
    Figures,
    arguments,
    gpt2_folder,
    in_fresh_process,
    load_touched,
    random_windows,
    report,
    seconds,
)

from layerfold.calibration import Calibration, calibration_windows
from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import POCKET
from layerfold.evaluators import Perplexity
from layerfold.inference.scoring import window_nats
from layerfold.maths.intervals import exponential
from layerfold.methods import Share
from layerfold.model.decoder import Decoder
from layerfold.progress import SILENT
from layerfold.search.scores import Scores
from layerfold.search.share import shared
from layerfold.search.stages import Blocks, Replaced
from layerfold.text.windows import TokenWindows


def perplexities(
    share: Share, decoder: Decoder, text: TokenWindows, calibration: Calibration | None
) -> dict[Blocks, float]:
    """Perplexity with each window shared, the base's under ()."""
    others = shared(share, share.windows(decoder), decoder, calibration, SILENT)
    scores = Scores(Replaced(decoder, others), text, divergence=False)
    scores.measure([(), *others])
    return {blocks: exponential(scores.mean(blocks, "perplexity")) for blocks in ((), *others)}


def from_scratch(share: Share, decoder: Decoder, text: TokenWindows, calibrating: TokenWindows) -> dict[Blocks, float]:
    """Perplexity with each window shared, each calibrated, shared and scored by itself."""
    found = {}
    for window in share.windows(decoder):
        copied = decoder.copy(share=True)
        share.at(window[0]).apply(copied, Calibration(decoder, calibrating) if share.needs_calibration else None)
        found[tuple(window)] = exponential(window_nats(copied, text).sum() / float(text.lengths.sum() - len(text)))
    return found


def measure_search(
    model: str | Path, share: Share, calibrating: TokenWindows | None, text: TokenWindows | None
) -> Figures:
    """Time both, in turn, and compare what they find."""
    if calibrating is None or text is None:
        pocket = load(POCKET)
        decoder = pocket.decoder
        calibrating = calibration_windows(pocket, None, 16_384, 0)
        text = Perplexity(split="validation", limit_tokens=16_384).windows(pocket)
    else:
        decoder = load_touched(Path(model))
    window_nats(decoder, random_windows(1, 8) if model != POCKET else text)  # thread pools, code pages
    found: list[dict[Blocks, float]] = []

    def search() -> None:
        calibration = Calibration(decoder, calibrating) if share.needs_calibration else None
        found.append(perplexities(share, decoder, text, calibration))

    quick = seconds(search)
    slow = seconds(lambda: found.append(from_scratch(share, decoder, text, calibrating)))
    found[0].pop(())
    return {
        "search, s": quick,
        "from scratch, s": slow,
        "times faster": slow / quick,
        "largest relative difference": max(abs(found[0][each] / found[1][each] - 1) for each in found[1]),
    }


def main() -> None:
    options = arguments(__doc__)
    figures: Figures = {}

    def add(prefix: str, measure: Callable[..., Figures], *settings: Any) -> None:
        found = in_fresh_process(measure, *settings)
        figures.update({f"{prefix}: {key}": value for key, value in found.items()})

    kinds = {"unaligned, svd": Share(k=4, base="mean", align="none", init="svd")}
    if not options.quick:
        kinds["aligned, data-svd"] = Share(k=4)
    for kind, share in kinds.items():
        add(f"pocket, windows of 4, {kind}", measure_search, POCKET, share, None, None)
    kinds = {
        kind: replace(share, base="mean") for kind, share in kinds.items()
    }  # a fitted one takes long on both sides
    with gpt2_folder() as folder:
        texts = [random_windows(count, CONTEXT) for count in ((1, 1) if options.quick else (4, 4))]
        for kind, share in kinds.items():
            add(f"gpt2, windows of 4, mean base, {kind}", measure_search, folder, share, *texts)
    report("share", figures, options.json)


if __name__ == "__main__":
    main()
