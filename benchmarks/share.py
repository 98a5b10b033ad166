"""Sharing FFNs: what bases, inits, ranks and windows cost in perplexity; the search for a window against scratch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean
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
from layerfold.methods.share.lowrank import BASES, INITS, RANKS
from layerfold.model.decoder import Decoder
from layerfold.progress import SILENT
from layerfold.search.scores import Scores
from layerfold.search.share import shared
from layerfold.search.stages import Blocks, Replaced
from layerfold.text.windows import TokenWindows

SIZES = (2, 3, 4, 5, 6)
LOW_RANKS = (2, 4, 8, 16, 32, 64)


def perplexities(
    share: Share, decoder: Decoder, text: TokenWindows, calibration: Calibration | None
) -> dict[Blocks, float]:
    """Perplexity with each window shared, the base's under ()."""
    others = shared(share, share.windows(decoder), decoder, calibration, SILENT)
    scores = Scores(Replaced(decoder, others), text, divergence=False)
    scores.measure([(), *others])
    return {blocks: exponential(scores.mean(blocks, "perplexity")) for blocks in ((), *others)}


def measure_inits(tokens: int) -> Figures:
    """Mean over all windows of four blocks, at rank 8, by base, init and ranks."""
    pocket = load(POCKET)
    text = Perplexity(limit_tokens=tokens).windows(pocket)
    calibration = Calibration(pocket.decoder, calibration_windows(pocket, None, 16_384, 0))
    figures: Figures = {}
    for base, init, ranks in product(BASES, INITS, RANKS):
        if ranks == "allotted" and init != "data-svd":
            continue
        found = perplexities(Share(k=4, base=base, init=init, ranks=ranks), pocket.decoder, text, calibration)
        name = f"{base}, {init}" + (", allotted ranks" if ranks == "allotted" else "")
        figures["base"] = found.pop(())
        figures[name] = mean(found.values())
    for anchor, align in (("middle", "hungarian"), ("last", "hungarian"), ("first", "none")):
        found = perplexities(Share(k=4, anchor=anchor, align=align), pocket.decoder, text, calibration)
        found.pop(())
        figures[f"fitted, data-svd, align {align} to the {anchor}"] = mean(found.values())
    return figures


def measure_table(tokens: int, selection_tokens: int, sizes: tuple[int, ...], ranks: tuple[int, ...]) -> Figures:
    """For each size of window and rank, at the window that is best on validation text at rank 8: test perplexity."""
    pocket = load(POCKET)
    test = Perplexity(limit_tokens=tokens).windows(pocket)
    selection = Perplexity(split="validation", limit_tokens=selection_tokens).windows(pocket)
    calibration = Calibration(pocket.decoder, calibration_windows(pocket, None, 16_384, 0))
    whole = pocket.decoder.size().parameters
    figures: Figures = {}
    for size in sizes:
        found = perplexities(Share(k=size), pocket.decoder, selection, calibration)
        found.pop(())
        start = min(found, key=lambda blocks: found[blocks])[0]
        for rank in ranks:
            decoder = pocket.decoder.copy(share=True)
            Share(window=f"{start}:{size}", rank=rank).apply(decoder, calibration)
            nats = window_nats(decoder, test).sum() / float((test.lengths - test.first_scored).sum())
            figures[f"window {start}:{size}, rank {rank}, removed %"] = 100 * (1 - decoder.size().parameters / whole)
            figures[f"window {start}:{size}, rank {rank}, perplexity"] = exponential(nats)
    return figures


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

    tokens = 2048 if options.quick else 16_384
    add("pocket, mean over windows of 4, rank 8", measure_inits, tokens)
    sizes, ranks = ((2, 4), (2, 8)) if options.quick else (SIZES, LOW_RANKS)
    add("pocket", measure_table, 4 * tokens, tokens, sizes, ranks)
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
