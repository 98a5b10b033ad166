"""Repair: its time on pocket against a calibration pass, and that its memory grows neither with text nor with depth."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from shape import (
    CONTEXT,
    Figures,
    arguments,
    gpt2_folder,
    in_fresh_process,
    load_touched,
    medians,
    peak_of,
    random_windows,
    report,
    seconds,
)

from layerfold import defaults
from layerfold.calibration import calibration_windows
from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import POCKET
from layerfold.inference.stepping import Stepper, fused_activations
from layerfold.inference.streaming import Stream
from layerfold.model.decoder import Decoder
from layerfold.repair.refit import refit_
from layerfold.repair.spans import spanning
from layerfold.text.windows import TokenWindows


@torch.no_grad()
def calibration_pass(decoder: Decoder, windows: TokenWindows) -> None:
    """Run every block once over the windows."""
    with fused_activations(decoder.model):
        stream = Stream(Stepper(decoder), windows)
        stream.passed(range(decoder.n_blocks))


def halved(decoder: Decoder) -> tuple[Decoder, list[int]]:
    """Return a copy without every second block, and the places that its blocks lead to."""
    smaller = decoder.copy()
    kept = list(range(0, decoder.n_blocks, 2))
    smaller.keep_(kept)
    return smaller, [*kept[1:], decoder.n_blocks]


def repair(decoder: Decoder, windows: TokenWindows, attention: bool) -> None:
    """Halve a copy of a decoder and repair it."""
    smaller, cuts = halved(decoder)
    refit_(smaller, decoder, cuts, windows, attention=attention)


def measure_time(tokens: int, rounds: int) -> Figures:
    """Time a calibration pass, both repairs and the quick repair of all candidates on pocket, interleaved."""
    model = load(POCKET)
    windows = calibration_windows(model, None, tokens, 0)
    work = {
        "refit": partial(repair, model.decoder, windows, False),
        "refit+attention": partial(repair, model.decoder, windows, True),
    }
    if tokens <= defaults.CALIBRATION_TOKENS:
        work["all spans, for a search"] = partial(
            spanning, model.decoder, windows, range(2, model.decoder.n_blocks + 1)
        )
    taken = []
    for _ in range(rounds):
        one_pass = seconds(partial(calibration_pass, model.decoder, windows))
        figures = {"one calibration pass, s": one_pass}
        for name, call in work.items():
            figures[f"{name}, s"] = seconds(call)
            figures[f"{name} / one calibration pass"] = figures[f"{name}, s"] / one_pass
        taken.append(figures)
    return medians(taken)


def measure_memory(folder: Path, blocks: int, tokens: int) -> float:
    """Peak above the weights of both models in megabytes."""
    decoder = load_touched(folder)
    decoder.keep_(range(blocks))
    smaller, cuts = halved(decoder)
    windows = random_windows(tokens // CONTEXT)
    calibration_pass(decoder, random_windows(1, 8))  # thread pools, code pages
    return peak_of(partial(refit_, smaller, decoder, cuts, windows, attention=True)) / 1e6


def main() -> None:
    options = arguments(__doc__)
    figures: Figures = {}
    for tokens in (4096,) if options.quick else (16_384, 65_536):
        found = in_fresh_process(measure_time, tokens, 1 if options.quick else 3)
        figures |= {f"pocket, {tokens} tokens: {key}": value for key, value in found.items()}
    with gpt2_folder() as folder:
        for blocks, tokens in ((4, 2048),) if options.quick else ((4, 2048), (8, 2048), (4, 8192)):
            figures[f"gpt2, {blocks} blocks, {tokens} tokens: refit+attention, extra peak MB"] = in_fresh_process(
                measure_memory, folder, blocks, tokens
            )
    report("repair", figures, options.json)


if __name__ == "__main__":
    main()
