"""Small results of what commands write: unrounded figures, by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from layerfold.records import Results, read_results
from layerfold.report.columns import columns, over_seeds, timing_check
from layerfold.report.report import figures

VERSION = 1
"""A new one where more is kept, or otherwise: results of the old one are out of date."""
_SHOWN_PROMPTS = 2
"""Of how many prompts the samples are kept."""
_TIMES = ("recovery_seconds",)
"""Figures of a study that differ from run to run though nothing is timed."""


def study(folder: Path) -> dict[str, Any]:
    """Return a study's figures as its CSV file has them, and some of what its rows wrote; no times."""
    results = read_results(folder)
    shown = [column for column in columns(results) if column.name not in _TIMES]
    seeds = over_seeds(results)
    rows = {label: _finite(figures(shown, results, label, seeds)) for label in results.labels}
    return {"rows": rows, "samples": _samples(results), "environment": _environment(results)}


def timed_study(folder: Path) -> dict[str, Any]:
    """Return a study's figures, the times too."""
    results = read_results(folder)
    rows = {label: _finite(figures(columns(results), results, label)) for label in results.labels}
    found = {"rows": rows, "samples": _samples(results), "same_model": timing_check(results)}
    return found | {"environment": _environment(results)}


def drop_search(folder: Path) -> dict[str, Any]:
    """Return what a search for blocks to drop found: the base, all candidates of one block, the best and worst."""
    found = json.loads((folder / "search.json").read_text(encoding="utf-8"))
    candidates = sorted(found["candidates"], key=lambda each: (len(each["removed"]), each["perplexity"]))
    kept = {}
    for number in sorted({len(each["removed"]) for each in candidates}):
        alike = [each for each in candidates if len(each["removed"]) == number]
        kept[str(number)] = alike if number == 1 else [*alike[:3], *alike[3:][-1:]]
    return {
        **{name: found[name] for name in ("base", "best", "eliminated", "work", "environment")},
        "candidates": kept,
        "number": len(candidates),
    }


def window_search(folder: Path) -> dict[str, Any]:
    """Return what a search for a window to share found."""
    found = json.loads((folder / "search.json").read_text(encoding="utf-8"))
    return {name: found[name] for name in ("base", "best", "eliminated", "environment")}


def plan(folder: Path) -> dict[str, Any]:
    """Return what a plan tried, and its winner."""
    found = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    return {name: found[name] for name in ("budget", "base", "trials", "winner", "environment")}


def benchmark(file: Path) -> dict[str, Any]:
    """Return what a benchmark wrote."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _samples(results: Results) -> list[dict[str, Any]]:
    """Return prompts with what every row wrote."""
    by_prompt: dict[str, dict[str, Any]] = {}
    for label in results.labels:
        for sample in (results.score(label, "generation") or {}).get("samples", [])[:_SHOWN_PROMPTS]:
            texts = {"greedy": sample["text"], "sampled": sample["sampled"]["text"]}
            by_prompt.setdefault(sample["prompt"], {})[label] = texts
    return [{"prompt": prompt, "texts": texts} for prompt, texts in by_prompt.items()]


def _environment(results: Results) -> dict[str, Any]:
    environments = [record.environment for record in results.records.values()]
    return environments[-1] if environments else {}


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """Leave out what was not measured."""
    return {name: value for name, value in row.items() if value is not None}
