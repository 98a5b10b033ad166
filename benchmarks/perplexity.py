"""Scoring speed and memory: layerfold against the straightforward Hugging Face loop, on the GPT-2 shape."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from shape import (
    CONTEXT,
    Figures,
    arguments,
    best_matrix_rate,
    gpt2_folder,
    in_fresh_process,
    load_touched,
    medians,
    peak_of,
    random_windows,
    report,
    seconds,
)

from layerfold.evaluators.size import flops_per_token
from layerfold.inference.scoring import window_nats
from layerfold.model.decoder import Decoder
from layerfold.text.windows import TokenWindows

LOOP_BATCHES = (1, 4)


@torch.no_grad()
def loop_nats(decoder: Decoder, windows: TokenWindows, batch: int) -> float:
    """Score windows the straightforward way; the loss is the mean over the tokens that have one before them."""
    total = 0.0
    for input_ids in windows.input_ids.split(batch):
        loss = decoder.model(input_ids, labels=input_ids).loss
        total += loss.item() * (input_ids.numel() - len(input_ids))
    return total


def measure_speed(folder: Path, count: int, rounds: int) -> Figures:
    """Time both interleaved with plain matrix products; ratios are taken within a round, then their medians."""
    decoder, windows = load_touched(folder), random_windows(count)
    work = {"layerfold": partial(window_nats, decoder, windows)}
    work |= {f"loop, batch {batch}": partial(loop_nats, decoder, windows, batch) for batch in LOOP_BATCHES}
    nats = {name: float(run().sum()) if name == "layerfold" else float(run()) for name, run in work.items()}  # warm-up
    # What is counted is what is done: the head runs on every token but the first of a window.
    head = 2 * decoder.model.get_output_embeddings().weight.numel()
    operations = count * (CONTEXT * flops_per_token(decoder, CONTEXT) - head)
    taken = []
    for _ in range(rounds):
        rate = best_matrix_rate()
        times = {name: seconds(run) for name, run in work.items()}
        rate = max(rate, best_matrix_rate())
        taken.append(
            {"matrix product, GFLOP/s": rate / 1e9}
            | {f"{name}, tokens/s": count * CONTEXT / time for name, time in times.items()}
            | {f"{name}, fraction of the matrix-product rate": operations / time / rate for name, time in times.items()}
            | {f"layerfold / {name}": times[name] / times["layerfold"] for name in times if name != "layerfold"}
        )
    differences = [abs(value / nats["layerfold"] - 1) for value in nats.values()]
    return {"tokens": count * CONTEXT, "rounds": rounds, **medians(taken), "relative difference": max(differences)}


def measure_memory(folder: Path, count: int, batch: int | None) -> float:
    """Peak above the loaded weights in megabytes; batch None is layerfold."""
    decoder, windows = load_touched(folder), random_windows(count)
    # One short window first: thread pools and code pages are not what is measured.
    window_nats(decoder, random_windows(1, 8)) if batch is None else loop_nats(decoder, random_windows(1, 8), 1)
    run = partial(window_nats, decoder, windows) if batch is None else partial(loop_nats, decoder, windows, batch)
    return peak_of(run) / 1e6


def main() -> None:
    options = arguments(__doc__)
    count, rounds = (2, 2) if options.quick else (4, 5)
    with gpt2_folder() as folder:
        memory = {"layerfold": in_fresh_process(measure_memory, folder, count, None)}
        memory |= {f"loop, batch {b}": in_fresh_process(measure_memory, folder, count, b) for b in LOOP_BATCHES}
        figures = in_fresh_process(measure_speed, folder, count, rounds)
    figures |= {f"{name}, extra peak MB": megabytes for name, megabytes in memory.items()}
    figures |= {
        f"layerfold / {name}, extra peak": memory["layerfold"] / megabytes
        for name, megabytes in memory.items()
        if name != "layerfold"
    }
    report("perplexity", figures, options.json)


if __name__ == "__main__":
    main()
