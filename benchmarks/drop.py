"""The search for blocks to drop against measuring each candidate from scratch."""

from __future__ import annotations

import random
import time
from itertools import chain, combinations
from statistics import mean, median

import numpy as np
import torch
from shape import Figures, arguments, report, seconds

from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import POCKET
from layerfold.evaluators import Perplexity
from layerfold.evaluators.size import flops_per_token
from layerfold.inference.scoring import window_nats
from layerfold.model.decoder import Decoder
from layerfold.progress import SILENT
from layerfold.search.scores import Scores
from layerfold.search.selection import Selection, exhaustive
from layerfold.search.stages import Blocks, Lacking
from layerfold.text.windows import TokenWindows

SLICES = 16


def subsets(n: int) -> list[Blocks]:
    """All sets of blocks to remove, the empty one and the full one included."""
    return list(chain.from_iterable(combinations(range(n), size) for size in range(n + 1)))


def from_scratch(decoder: Decoder, removed: Blocks, windows: TokenWindows) -> tuple[float, float]:
    """Nats of a candidate scored by itself, as `layerfold eval` does it, and the seconds that takes.

    Building it, which costs a small model nearly half as much again, is not in the time.
    """
    one = decoder.copy(share=True)
    one.keep_([index for index in range(decoder.n_blocks) if index not in removed])
    started = time.perf_counter()
    nats = float(window_nats(one, windows).sum())
    return nats, time.perf_counter() - started


def limit(decoder: Decoder, context: int) -> float:
    """By how much sharing prefixes can win at most over all subsets, by operations."""
    n = decoder.n_blocks
    head = 2 * decoder.model.get_output_embeddings().weight.numel()
    block = (flops_per_token(decoder, context) - head) / n
    return (n / 2 * block + head) / ((2**n - 1) / 2**n * block + head)


def walk_against_scratch(decoder: Decoder, windows: TokenWindows, sample: int) -> Figures:
    """Time the walk over all subsets, and between its slices candidates from scratch, drawn from all of them."""
    stages = Lacking(decoder)
    scores = Scores(stages, windows)
    candidates = sorted(subsets(decoder.n_blocks), key=stages.path)
    drawn = random.Random(0).sample([removed for removed in candidates if len(removed) < decoder.n_blocks], sample)
    scores.measure([()])  # what the divergence needs of the model as it is; a search takes it once
    from_scratch(decoder, (), windows)
    walked, scratched, alone = [], [], {}
    for part in range(SLICES):
        mine = candidates[part * len(candidates) // SLICES : (part + 1) * len(candidates) // SLICES]
        walked.append(seconds(lambda mine=mine: scores.measure(mine)))
        found = {removed: from_scratch(decoder, removed, windows) for removed in drawn[part::SLICES]}
        alone |= found
        scratched.append(mean(took for _, took in found.values()))
    apart = [scores.mean(removed, "perplexity") - nats / windows.tokens for removed, (nats, _) in alone.items()]
    faster = len(candidates) * sum(scratched) / SLICES / sum(walked)
    most = limit(decoder, windows.context)
    return {
        "candidates": len(candidates),
        "tokens": windows.tokens,
        "walk, s": sum(walked),
        "from scratch, s for each": median(scratched),
        "times faster": faster,
        "limit by operations": most,
        "of the limit": faster / most,
        "largest relative difference of perplexity": float(np.abs(np.expm1(apart)).max()),
    }


def best_of_each_size(decoder: Decoder, windows: TokenWindows, sample: int) -> Figures:
    """Time the race for the best subset of each size, and before and after it candidates from scratch."""
    n = decoder.n_blocks
    drawn = random.Random(1).sample([removed for removed in subsets(n) if len(removed) < n], sample)
    half = drawn[::2], drawn[1::2]
    before = [from_scratch(decoder, removed, windows)[1] for removed in half[0]]
    scores = Scores(Lacking(decoder), windows)
    select = Selection(scores, "perplexity", race=True, seed=0, progress=SILENT)
    took = seconds(lambda: exhaustive(select, range(n), range(1, n), 1))
    after = [from_scratch(decoder, removed, windows)[1] for removed in half[1]]
    brute = (2**n - 2) * mean(before + after)
    return {
        "race, s": took,
        "from scratch, s for all": brute,
        "times faster": brute / took,
        "windows scored, of all": select.scored / select.all_windows,
    }


def main() -> None:
    options = arguments(__doc__)
    torch.set_grad_enabled(False)
    figures: Figures = {}

    def add(name: str, found: Figures) -> None:
        print(f"\n{name}")
        report("drop", found, None)
        figures.update({f"{name}: {key}": value for key, value in found.items()})

    pocket = load(POCKET)
    few, many = (
        Perplexity(split="validation", limit_tokens=tokens).windows(pocket)
        for tokens in ((256, 1024) if options.quick else (1024, 4096))
    )
    add("pocket, walk", walk_against_scratch(pocket.decoder, few, 64 if options.quick else 256))
    add("pocket, best of each size", best_of_each_size(pocket.decoder, many, 32 if options.quick else 128))
    report("drop", figures, options.json)


if __name__ == "__main__":
    main()
