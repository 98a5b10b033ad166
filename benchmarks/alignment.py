"""Aligning the FFNs of all groups: layerfold against the published pipeline's way, same model and tokens."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
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

from layerfold.calibration import Calibration, Pair, calibration_windows
from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import POCKET
from layerfold.maths.linalg import match_neurons
from layerfold.methods import Merge
from layerfold.model.decoder import Decoder
from layerfold.text.windows import TokenWindows

Orders = dict[Pair, NDArray[np.int64]]


def pairs_of(decoder: Decoder, n: int) -> list[Pair]:
    """(anchor, other) for every group of n."""
    return [(group[0], other) for group in Merge(n=n).group_indices(decoder.n_blocks) for other in group[1:]]


def layerfold_orders(decoder: Decoder, windows: TokenWindows, pairs: list[Pair], stages: dict[str, float]) -> Orders:
    """Align with layerfold; adds up the time spent in assignments, which may run beside other work."""

    def timed(correlation: torch.Tensor, **options: Any) -> Any:
        found = []
        took = seconds(lambda: found.append(match_neurons(correlation, **options)))
        stages["assignment"] = stages.get("assignment", 0.0) + took
        return found[0]

    with mock.patch("layerfold.calibration.match_neurons", timed):
        matches = Calibration(decoder, windows).matches(pairs)
    return {pair: match.order.numpy() for pair, match in matches.items()}


@torch.no_grad()
def published_orders(decoder: Decoder, windows: TokenWindows, pairs: list[Pair], stages: dict[str, float]) -> Orders:
    """Align the published way; one forward pass serves all pairs."""
    kept: dict[int, list[NDArray[np.float32]]] = {index: [] for pair in pairs for index in pair}

    def collect() -> None:
        def keep(index: int, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            kept[index].append(inputs[0].reshape(-1, inputs[0].shape[-1]).numpy())

        blocks = decoder.blocks
        handles = [blocks[i].ffn.down.module.register_forward_pre_hook(partial(keep, i)) for i in kept]
        for input_ids, length in zip(windows.input_ids, windows.lengths.tolist(), strict=True):
            decoder.model(input_ids[None, :length])
        for handle in handles:
            handle.remove()

    stages["forward"] = seconds(collect)
    orders: Orders = {}
    correlation = np.empty(0)

    def correlate(pair: Pair) -> None:
        nonlocal correlation
        both = np.concatenate([np.concatenate(kept[index]) for index in pair], axis=1)
        d_ffn = both.shape[1] // 2
        correlation = np.corrcoef(both, rowvar=False)[:d_ffn, d_ffn:]

    def assign(pair: Pair) -> None:
        orders[pair] = linear_sum_assignment(-correlation)[1]

    stages["correlation"] = stages["assignment"] = 0.0
    for pair in pairs:
        stages["correlation"] += seconds(partial(correlate, pair))
        stages["assignment"] += seconds(partial(assign, pair))
    return orders


WAYS = {"layerfold": layerfold_orders, "published": published_orders}


def read(model: str | Path, tokens: int) -> tuple[Decoder, TokenWindows]:
    """The embedded model with its own text, or the GPT-2 shape with random tokens."""
    if model == POCKET:
        pocket = load(POCKET)
        return pocket.decoder, calibration_windows(pocket, None, tokens, 0)
    return load_touched(Path(model)), random_windows(tokens // CONTEXT)


def measure_speed(model: str | Path, n: int, tokens: int, rounds: int) -> Figures:
    """Time both ways interleaved, and compare what they assign."""
    decoder, windows = read(model, tokens)
    pairs = pairs_of(decoder, n)
    orders: dict[str, Orders] = {}
    taken = []
    for _ in range(rounds):
        figures: dict[str, float] = {}
        for name, way in WAYS.items():
            stages: dict[str, float] = {}
            total = seconds(
                lambda way=way, name=name, stages=stages: orders.update({name: way(decoder, windows, pairs, stages)})
            )
            figures |= {f"{name}, s": total} | {f"{name}, {stage}, s": time for stage, time in stages.items()}
        taken.append(figures | {"times faster": figures["published, s"] / figures["layerfold, s"]})
    equal = [np.mean(orders["layerfold"][pair] == orders["published"][pair]) for pair in pairs]
    return {"pairs": len(pairs), **medians(taken), "equal assignment": float(np.mean(equal))} | (
        {} if min(equal) == 1 else total_correlations(decoder, windows, pairs, orders)
    )


def total_correlations(
    decoder: Decoder, windows: TokenWindows, pairs: list[Pair], orders: dict[str, Orders]
) -> Figures:
    """Where assignments differ: what each is worth on the same correlations."""
    correlations = Calibration(decoder, windows).correlations(pairs)
    return {
        f"{name}, total correlation": sum(
            float(correlations[pair].gather(1, torch.from_numpy(found[pair])[:, None]).sum(dtype=torch.float64))
            for pair in pairs
        )
        for name, found in orders.items()
    }


def measure_memory(model: str | Path, n: int, tokens: int, way: str) -> float:
    """Peak above the loaded weights in megabytes."""
    decoder, windows = read(model, tokens)
    WAYS[way](decoder, random_windows(1, 8) if model != POCKET else windows, [], {})  # thread pools, code pages
    return peak_of(lambda: WAYS[way](decoder, windows, pairs_of(decoder, n), {})) / 1e6


def main() -> None:
    options = arguments(__doc__)
    cases = [(POCKET, 2, 16_384), (POCKET, 4, 16_384)]
    cases += [("gpt2", n, tokens) for n in (2, 4) for tokens in ((2048,) if options.quick else (4096,))]
    figures: Figures = {}
    with gpt2_folder() as folder:
        for name, n, tokens in cases:
            model = folder if name == "gpt2" else name
            rounds = 1 if options.quick or name == "gpt2" else 3
            found = in_fresh_process(measure_speed, model, n, tokens, rounds)
            if n == 2:
                memory = {way: in_fresh_process(measure_memory, model, n, tokens, way) for way in WAYS}
                found |= {f"{way}, extra peak MB": megabytes for way, megabytes in memory.items()}
                found["layerfold / published, extra peak"] = memory["layerfold"] / memory["published"]
            print(f"\n{name}, n = {n}, {tokens:,} tokens")
            report("alignment", found, None)
            figures |= {f"{name}, n = {n}, {tokens} tokens: {key}": value for key, value in found.items()}
    report("alignment", figures, options.json)


if __name__ == "__main__":
    main()
