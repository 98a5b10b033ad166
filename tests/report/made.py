"""Results as a study of eleven variants would leave them, and what searches and plans would find: nothing is run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from plans import TRIALS, trial

from layerfold.maths.intervals import Interval
from layerfold.planning import Budget, Evaluation, Planned
from layerfold.planning.results import Winner
from layerfold.records import Record, Results
from layerfold.search import FoundWindows, Window
from layerfold.search.results import Candidate, Found, HeldOutScore, Timing

MEASURED = {
    "base": (81.2379, 6961920, 12, 9.0213),
    "merged_2": (737.4412, 6566016, 12, 9.0431),
    "merged_4": (1884.019, 5774208, 12, 8.9877),
    "merged_6": (3127.55, 4982400, 12, 9.0312),
    "merged_8": (4466.3, 4190592, 12, 8.9954),
    "merged_10": (6021.77, 3398784, 12, 9.0102),
    "compressed_2": (2402.81, 4586112, 6, 4.8123),
    "compressed_4": (5871.2, 3398240, 3, 2.9111),
    "compressed_6": (8120.4, 2804320, 2, 2.2511),
    "compressed_8": (8544.9, 2804320, 2, 2.2468),
    "compressed_10": (9012.613, 2501888, 2, 2.0103),
}
"""Perplexity, parameters, blocks and milliseconds a token, by label."""
ENVIRONMENT = {"versions": {"torch": "2.13.0"}, "threads": 2}
PROMPTS = ("The history of the city began", "In the second half of the season, the team")
SENTENCE = "when the river was crossed by a small group of people who had come from the north to settle there."

WITH_RECOVERY = ("size", "perplexity", "latency", "generation", "recovery")


def estimate(value: float, low: float, high: float, unit: str) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "unit": unit, "lower_is_better": True}


def perplexity_score(value: float, base: float | None, **changes: Any) -> dict[str, Any]:
    score = estimate(value, value * 0.962, value * 1.041, "perplexity") | {
        "tokens": 131072,
        "bits_per_byte": 1.7251,
        "context": 512,
        "stride": 512,
        "corpus": "movie-reviews",
        "split": "test",
        "corpus_sha256": "0f" * 32,
        "tokens_sha256": "a3" * 32,
        "protocol": "sound",
        "unit_nats": [123.456789] * 40,
        "unit_tokens": [512] * 40,
    }
    if base is not None:
        ratio = value / base
        score["versus_base"] = {"value": ratio, "low": ratio * 0.975, "high": ratio * 1.027}
    return score | changes


def size_score(parameters: int, blocks: int) -> dict[str, Any]:
    return estimate(parameters, parameters, parameters, "parameters") | {
        "parameters": parameters,
        "nonzero": parameters - 3,
        "bytes": 4 * parameters + 1024,
        "compact_bytes": 4 * parameters + 512,
        "dtype": "float32",
        "flops_per_token": 2 * parameters,
        "context": 512,
        "blocks": blocks,
    }


def latency_score(value: float, base: float | None) -> dict[str, Any]:
    score = estimate(value, value * 0.991, value * 1.018, "ms/token") | {
        "prefill": {"value": value * 1.7, "low": value * 1.6, "high": value * 1.9},
        "new_tokens": 64,
        "prompt_tokens": 64,
        "rounds": 20,
        "threads": 2,
    }
    if base is not None:
        score["speedup"] = {"value": base / value, "low": base / value * 0.98, "high": base / value * 1.02}
    return score


def generation_score(index: int) -> dict[str, Any]:
    repeated = min(0.95, 0.03 + 0.09 * index)
    samples = [
        {
            "prompt": prompt,
            "text": f"{SENTENCE} {SENTENCE}" if index < 3 else "the the of the of of the , and of the of the " * 5,
            "repeated_fraction": repeated + 0.01 * offset,
        }
        for offset, prompt in enumerate(PROMPTS)
    ]
    return estimate(repeated, repeated * 0.8, min(1.0, repeated * 1.2), "fraction") | {"samples": samples}


def recovery_score(before: float, **changes: Any) -> dict[str, Any]:
    """A run of 49 steps of 2,048 tokens that halves what the loss, in nats, is above 4.3."""
    first = math.log(before)
    last = 4.3 + (first - 4.3) / 2
    validation = math.exp(last)
    score = estimate(validation, validation, validation, "validation perplexity") | {
        "method": "distill",
        "tokens": 100352,
        "search_tokens": 75264,
        "seconds": 61.25,
        "learning_rate": 0.001,
        "learning_rates": [
            {"learning_rate": 0.0003, "validation": 150.125},
            {"learning_rate": 0.001, "validation": validation},
            {"learning_rate": 0.003, "validation": None},
        ],
        "steps": 49,
        "best_step": 49,
        "curve": {
            "train": [[2048 * step, first + (last - first) * step / 49] for step in range(1, 50)],
            "validation": [[2048 * step, first + (last - first) * step / 49] for step in (0, 12, 24, 37, 49)],
        },
        "before": {"value": before, "low": before * 0.96, "high": before * 1.04},
        "parameters_trained": 4290123,
    }
    return score | changes


def pairs_of(label: str) -> list[dict[str, Any]]:
    group = int(label.partition("_")[2])
    return [
        {
            "anchor": block - block % group,
            "block": block,
            "correlation": 0.82 - 0.03 * (block % group),
            "unaligned": 0.011 * (block % group),
        }
        for block in range(12)
        if block % group
    ]


def make_record(label: str, evaluator: str, score: dict[str, Any], **changes: Any) -> Record:
    method = {"merged": "merge", "compressed": "collapse"}.get(label.partition("_")[0])
    values: dict[str, Any] = {
        "key": f"{evaluator}-{label}",
        "label": label,
        "evaluator": evaluator,
        "protocol": f"{evaluator}-1",
        "score": score,
        "subject": {"method": {"name": method}} if method else {},
        "notes": {"pairs": pairs_of(label)} if method else {},
        "environment": {
            "versions": {"python": "3.12.8", "torch": "2.13.0"},
            "threads": 2,
            "processor": "A processor @ 2.40 GHz",
            "device": "cpu",
        },
        "seconds": 1.5,
    }
    return Record(**values | changes)


def make_results(
    rename: dict[str, str] | None = None,
    replace: dict[tuple[str, str], Record | None] | None = None,
    scores: dict[tuple[str, str], dict[str, Any]] | None = None,
    evaluators: Sequence[str] = ("size", "perplexity", "latency", "generation"),
    labels: Sequence[str] = tuple(MEASURED),
) -> Results:
    """Build results; `rename` gives labels other names.

    By label and evaluator `replace` gives other records (None: none), and `scores` what else scores hold.
    """
    records: dict[tuple[str, str], Record | None] = {}
    for index, (label, (perplexity, parameters, blocks, milliseconds)) in enumerate(MEASURED.items()):
        base = (None,) * 4 if label == "base" else MEASURED["base"]
        measured = {
            "size": size_score(parameters, blocks),
            "perplexity": perplexity_score(perplexity, base[0]),
            "latency": latency_score(milliseconds, base[3]),
            "generation": generation_score(index),
            "recovery": recovery_score(perplexity),
        }
        name = (rename or {}).get(label, label)
        records |= {
            (name, evaluator): make_record(label, evaluator, score | (scores or {}).get((name, evaluator), {}))
            for evaluator, score in measured.items()
        }
    records |= replace or {}
    names = tuple((rename or {}).get(label, label) for label in labels)
    return Results(
        base="pocket",
        recipe={"base": "pocket", "seed": 0, "variants": list(names)},
        labels=names,
        evaluators=tuple(evaluators),
        records={
            (label, evaluator): found
            for (label, evaluator), found in records.items()
            if found is not None and label in names and evaluator in evaluators
        },
    )


def make_recovered(changes: dict[str, dict[str, Any] | None] | None = None, **options: Any) -> Results:
    """Build results with recovery; `changes` are those of its scores, by label (None: no record)."""
    results = make_results(**{"evaluators": WITH_RECOVERY} | options)
    records = dict(results.records)
    for label, changed in (changes or {}).items():
        original = records.pop((label, "recovery"))
        if changed is not None:
            records[label, "recovery"] = replace(original, score=original.score | changed)
    return replace(results, records=records)


SINGLE = [8080.0, 160.25, 96.5, 93.125, 92.0, 91.25, 91.5, 92.75, 93.5, 94.0, 95.75, 138.0]
BASE_PERPLEXITY = 86.8
TEXTS = [
    {"corpus": "movie-reviews", "split": split, "tokens": tokens, "tokens_sha256": digest * 32}
    for split, tokens, digest in (("validation", 65536, "0f"), ("test", 131072, "a3"))
]


def candidate(removed: Sequence[int], perplexity: float, blocks: int = 12, **changes: Any) -> Candidate:
    values: dict[str, Any] = {
        "changed": tuple(removed),
        "blocks": blocks - len(removed),
        "perplexity": perplexity,
        "kl": 0.5 * len(removed),
        "parameters": 2501888 + 405504 * (blocks - len(removed)),
    }
    return Candidate(**values | changes)


def on_test(perplexity: float, base: float) -> HeldOutScore:
    ratio = perplexity / base
    return HeldOutScore(
        Interval(perplexity, 0.96 * perplexity, 1.04 * perplexity),
        Interval(ratio, 0.98 * ratio, 1.02 * ratio) if ratio != 1 else Interval(1.0, 1.0, 1.0),
    )


def timing(removed: int, blocks: int) -> Timing:
    milliseconds, speedup = 1.0 + 0.5 * (blocks - removed), (1.0 + 0.5 * blocks) / (1.0 + 0.5 * (blocks - removed))
    return Timing(
        Interval(milliseconds, 0.99 * milliseconds, 1.02 * milliseconds),
        Interval(speedup, 0.98 * speedup, 1.02 * speedup) if removed else Interval(1.0, 1.0, 1.0),
    )


def make_found(perplexities: Mapping[tuple[int, ...], float] | None = None, blocks: int = 12, **changes: Any) -> Found:
    """Build what a search of 12 blocks finds when it removes one; `perplexities` are other candidates', by removed."""
    if perplexities is None:
        perplexities = {(index,): perplexity for index, perplexity in enumerate(SINGLE)}
    base = candidate((), BASE_PERPLEXITY, blocks)
    candidates = tuple(candidate(removed, perplexity, blocks) for removed, perplexity in perplexities.items())
    best: dict[int, Candidate] = {}
    for each in candidates:
        if each.perplexity < best.get(len(each.removed), replace(each, perplexity=math.inf)).perplexity:
            best[len(each.removed)] = each
    numbers = {0, *(len(each.removed) for each in candidates)}
    values: dict[str, Any] = {
        "model": "pocket",
        "model_sha256": "5e" * 32,
        "settings": {"part": "block", "remove": sorted(numbers - {0}), "objective": "perplexity", "seed": None},
        "text": TEXTS[0],
        "test_text": TEXTS[1],
        "parts": blocks,
        "base": base,
        "candidates": candidates,
        "best": best,
        "tests": {
            each.removed: on_test(1.25 * each.perplexity, 1.25 * base.perplexity) for each in (base, *best.values())
        },
        "timings": {number: timing(number, blocks) for number in sorted(numbers)},
        "work": {"scored_windows": 786432, "windows_of_all_candidates": 9437184},
        "environment": ENVIRONMENT,
    }
    return Found(**values | changes)


def make_sets(most: int, blocks: int = 12) -> dict[tuple[int, ...], float]:
    """Return perplexities of all sets of up to so many of the 12 blocks: products of those of single blocks."""
    return {
        removed: BASE_PERPLEXITY
        * math.prod(SINGLE[index % 12] / BASE_PERPLEXITY for index in removed)
        * (1.1 + 0.1 * math.sin(17 * sum((index + 1) ** 2 for index in removed))) ** (len(removed) - 1)
        for number in range(1, most + 1)
        for removed in combinations(range(blocks), number)
    }


def make_windows(perplexities: Mapping[tuple[int, int], float] | None = None, **changes: Any) -> FoundWindows:
    """Build what a search for a window finds; `perplexities` are by first block and size."""
    if perplexities is None:
        perplexities = {(0, 2): 173.6, (1, 2): 88.5, (2, 2): 90.25, (0, 3): 217.0, (1, 3): 97.125}
    base = Window((), BASE_PERPLEXITY, 0.0, 6960768)
    candidates = tuple(
        Window(tuple(range(start, start + size)), perplexity, 0.125 * size, 6960768 - 264192 * (size - 1))
        for (start, size), perplexity in perplexities.items()
    )
    best: dict[int, Window] = {}
    for each in candidates:
        if each.perplexity < best.get(len(each.blocks), replace(each, perplexity=math.inf)).perplexity:
            best[len(each.blocks)] = each
    share = {"rank": 8, "base": "fitted", "init": "data-svd", "ranks": "uniform", "align": "none"}
    values: dict[str, Any] = {
        "model": "pocket",
        "model_sha256": "5e" * 32,
        "settings": {"k": [2, 3], "objective": "perplexity", "share": share | {"anchor": "first"}},
        "text": TEXTS[0],
        "test_text": TEXTS[1],
        "base": base,
        "candidates": candidates,
        "best": best,
        "tests": {
            each.blocks: on_test(1.25 * each.perplexity, 1.25 * base.perplexity) for each in (base, *best.values())
        },
        "work": {"scored_windows": 640, "windows_of_all_candidates": 1280},
        "environment": ENVIRONMENT,
    }
    return FoundWindows(**values | changes)


def make_plan(
    kind: str = "parameters",
    value: float = 4594106,
    trials: Sequence[Evaluation] = TRIALS,
    versus_base: Interval | None = None,
    speedup: Interval | None = None,
    timed: bool = True,
    **changes: Any,
) -> Planned:
    """Build what a plan finds; what was planned is the best that is repaired on all of the text."""
    base = trial("base", 6960768, BASE_PERPLEXITY, repaired=False)
    best = min((each for each in trials if each.whole), key=lambda each: each.perplexity)
    ratio = versus_base or Interval(1.25, 1.21, 1.29)
    faster = speedup or Interval(1.375, 1.34, 1.41)
    values: dict[str, Any] = {
        "model": "pocket",
        "model_sha256": "5e" * 32,
        "budget": Budget(kind, value),
        "settings": {
            "protocol": "plan-1",
            "parameters": "66%",
            "speedup": None,
            "perplexity": None,
            "corpus": "movie-reviews",
            "calibration_tokens": 131072,
            "repair_tokens": 524288,
            "test_tokens": 131072,
            "rounds": 12 * timed,
            "seed": 0,
        },
        "text": TEXTS[0],
        "test_text": TEXTS[1],
        "base": base,
        "base_test": on_test(1.25 * BASE_PERPLEXITY, 1.25 * BASE_PERPLEXITY),
        "trials": (base, *trials),
        "winner": Winner(
            best,
            HeldOutScore(ratio.map(lambda factor: 1.25 * BASE_PERPLEXITY * factor), ratio),
            Timing(Interval(4.75, 4.5, 5.0), faster) if timed else None,
        ),
        "environment": ENVIRONMENT,
    }
    return Planned(**values | changes)
