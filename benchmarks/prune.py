"""Pruning: the time and memory of sparsegpt against a calibration pass, and the speed of FFNs with fewer neurons."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

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

from layerfold.calibration import Calibration
from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import POCKET, Model
from layerfold.checkpoint.provenance import Provenance
from layerfold.evaluators import Latency
from layerfold.inference.stepping import Stepper, fused_activations
from layerfold.methods import Prune
from layerfold.model.decoder import Decoder
from layerfold.records import BASE_LABEL
from layerfold.text.windows import TokenWindows

SETTINGS: dict[str, dict[str, Any]] = {
    "magnitude": {},
    "wanda": {"criterion": "wanda"},
    "sparsegpt": {"criterion": "sparsegpt"},
}


@torch.no_grad()
def calibration_pass(decoder: Decoder, windows: TokenWindows) -> None:
    """Run every block once over the windows and keep nothing: the least that any criterion with activations takes."""
    stepper = Stepper(decoder)
    with fused_activations(decoder.model):
        hidden = [stepper.embed(ids[None]) for ids in windows.input_ids]
        for index in range(decoder.n_blocks):
            hidden = [stepper.step(index, each) for each in hidden]


def prune(decoder: Decoder, windows: TokenWindows, sparsity: float, settings: dict[str, Any]) -> None:
    """Prune half of the weights in place."""
    method = Prune(sparsity=sparsity, **settings)
    method.apply(decoder, Calibration(decoder, windows) if method.needs_calibration else None)


def measure_time(folder: Path, tokens: int, rounds: int) -> Figures:
    """Time a calibration pass and each criterion, interleaved."""
    windows = random_windows(tokens // CONTEXT)
    taken = []
    for _ in range(rounds):
        figures = {}
        decoder = load_touched(folder)
        one_pass = figures["one calibration pass, s"] = seconds(partial(calibration_pass, decoder, windows))
        for name, settings in SETTINGS.items():
            copied = decoder.copy()
            figures[f"{name}, s"] = seconds(partial(prune, copied, windows, 0.5, settings))
            figures[f"{name} / one calibration pass"] = figures[f"{name}, s"] / one_pass
        taken.append(figures)
    return medians(taken)


def measure_memory(folder: Path, tokens: int, name: str) -> float:
    """Peak above the loaded weights in megabytes."""
    decoder = load_touched(folder)
    windows = random_windows(tokens // CONTEXT)
    calibration_pass(decoder, random_windows(1, 8))  # thread pools, code pages
    work: Any = partial(calibration_pass, decoder, windows)
    if name in SETTINGS:
        work = partial(prune, decoder, windows, 0.5, SETTINGS[name])
    return peak_of(work) / 1e6


def measure_speed(model: str | Path, rounds: int) -> Figures:
    """Time generation with 25 % and 50 % of the neurons removed against the base, and half of the weights zeroed."""
    base = load(POCKET) if model == POCKET else Model(load_touched(Path(model)), None, Provenance("gpt2"))
    models = {BASE_LABEL: base}
    variants = {
        "25% of the neurons removed": Prune(sparsity=0.25, structure="neurons"),
        "50% of the neurons removed": Prune(sparsity=0.5, structure="neurons"),
        "50% of the weights zero": Prune(sparsity=0.5),
    }
    for label, method in variants.items():
        models[label] = base.copy()
        method.apply(models[label].decoder, None)
    scores = Latency(rounds=rounds).compare(models)
    figures: Figures = {}
    for label in variants:
        speedup = scores[label].details["speedup"]
        figures |= {
            f"{label}, speed-up{of}": speedup[key] for of, key in (("", "value"), (", low", "low"), (", high", "high"))
        }
    return figures


def main() -> None:
    options = arguments(__doc__)
    tokens, rounds = (2048, 1) if options.quick else (16_384, 3)
    figures: Figures = {}
    with gpt2_folder() as folder:
        found = in_fresh_process(measure_time, folder, tokens, rounds)
        figures |= {f"gpt2, {tokens} tokens: {key}": value for key, value in found.items()}
        for name in ("one calibration pass", *SETTINGS):
            figures[f"gpt2, {tokens} tokens: {name}, extra peak MB"] = in_fresh_process(
                measure_memory, folder, tokens, name
            )
        for name, model in ((POCKET, POCKET), ("gpt2", folder)):
            found = in_fresh_process(measure_speed, model, 4 if options.quick else 20)
            figures |= {f"{name}: {key}": value for key, value in found.items()}
    report("prune", figures, options.json)


if __name__ == "__main__":
    main()
