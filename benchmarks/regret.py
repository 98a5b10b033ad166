"""What races and beams lose against the full enumeration of all sets of blocks to drop."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import numpy as np
import torch
from drop import subsets
from shape import Figures, arguments, report

from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import POCKET
from layerfold.evaluators import Perplexity
from layerfold.progress import SILENT
from layerfold.search.scores import Scores
from layerfold.search.selection import Selection, beam, exhaustive
from layerfold.search.stages import Blocks, Lacking

RUN = Path("runs/benchmark-regret")
SEEDS = 200


def regrets(scores: Scores, n: int) -> Figures:
    """What strategies lose against the full enumeration that `scores` holds; nothing is measured again."""
    counts = range(1, n)
    exact = exhaustive(Selection(scores, "perplexity", race=False, seed=0, progress=SILENT), range(n), counts, 1)

    def regret(best: dict[int, list[Blocks]]) -> list[float]:
        """Perplexity over the best one's, less 1, by how many are removed."""
        return [
            float(np.expm1(scores.mean(best[count][0], "perplexity") - scores.mean(exact[count][0], "perplexity")))
            for count in counts
        ]

    figures: Figures = {}
    raced, scored = [], []
    for seed in range(SEEDS):
        select = Selection(scores, "perplexity", race=True, seed=seed, progress=SILENT)
        raced.append(regret(exhaustive(select, range(n), counts, 1)))
        scored.append(select.scored / select.all_windows)
    figures["race, seeds"] = SEEDS
    figures["race, seeds with regret at any size from 1 to 6"] = sum(max(each[:6]) > 0 for each in raced)
    figures["race, seeds with regret at any size"] = sum(max(each) > 0 for each in raced)
    figures["race, largest regret"] = max(map(max, raced))
    figures["race, windows scored, of all, median"] = median(scored)
    for width in (1, 2, 4, 8):
        select = Selection(scores, "perplexity", race=False, seed=0, progress=SILENT)
        lost = regret(beam(select, range(n), counts, 1, width))
        name = "greedy" if width == 1 else f"beam of {width}"
        figures[f"{name}, candidates"] = len(select.finished)
        figures[f"{name}, largest regret"] = max(lost)
        for count, each in zip(counts, lost, strict=True):
            figures[f"{name}, regret without {count}"] = each
    return figures


def main() -> None:
    options = arguments(__doc__)
    torch.set_grad_enabled(False)
    pocket = load(POCKET)
    windows = Perplexity(split="validation", limit_tokens=1024 if options.quick else 2048).windows(pocket)
    # Kept: it takes long.
    file = RUN / f"scores-{windows.sha256[:12]}-{pocket.sha256[:12]}.safetensors"
    scores = Scores(Lacking(pocket.decoder), windows, file=file, key=pocket.sha256)
    scores.measure(subsets(pocket.decoder.n_blocks))
    report("regret", {"tokens": windows.tokens, **regrets(scores, pocket.decoder.n_blocks)}, options.json)


if __name__ == "__main__":
    main()
