"""Perplexity after recovery: variant x method x tokens, with the paired quotient of distilling over fine-tuning."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import POCKET
from layerfold.cli.console import drawn
from layerfold.environment import environment
from layerfold.evaluators import Perplexity
from layerfold.evaluators.perplexity import versus
from layerfold.files import write_text
from layerfold.records import RECOVERY
from layerfold.study.recipe import read_recipe
from layerfold.study.study import Study

VARIANTS: list[dict[str, Any]] = [
    {"label": "compressed_2", "collapse": {"n": 2}},
    {"label": "pairs 1-10 collapsed", "collapse": {"groups": "1-2,3-4,5-6,7-8,9-10"}},
]
METHODS = ("finetune", "distill")
TOKENS = (100_000, 200_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few tokens, one variant: a look, not a figure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and the environment here")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark-recovery"), help="goes on from what is there")
    options = parser.parse_args()
    base = load(POCKET)
    budgets, variants = ((4_096,), VARIANTS[:1]) if options.quick else (TOKENS, VARIANTS)
    rows = []
    for tokens in budgets:
        scores: dict[tuple[str, str], dict[str, Any]] = {}
        for method in METHODS:
            recipe = read_recipe(
                {
                    "variants": variants,
                    "evaluate": [{"perplexity": {"limit_tokens": 4_096 if options.quick else 65_536}}],
                    "recovery": {method: {"tokens": tokens}},
                }
            )
            study = Study(recipe, options.runs, base=base)
            with drawn() as progress:
                for record in study.run(progress):
                    print(f"{tokens:,} {method} {record.label} {record.evaluator}: {record.score['value']:.2f}")
            results = study.results()
            for label in results.labels:
                scores[label, method] = {
                    "perplexity": results.score(label, Perplexity.name),
                    "recovery": results.score(label, RECOVERY),
                }
        for label in dict.fromkeys(label for label, _ in scores):
            rows.append(_row(label, tokens, [scores[label, method] for method in METHODS]))
    _print(rows)
    if options.json is not None:
        document = {"benchmark": "recovery", "rows": rows, "environment": environment()}
        write_text(options.json, json.dumps(document, indent=1) + "\n")


def _row(label: str, tokens: int, found: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"variant": label, "tokens": tokens, "before": found[0]["recovery"]["before"]["value"]}
    for method, each in zip(METHODS, found, strict=True):
        done = each["recovery"]
        row[method] = {bound: each["perplexity"][bound] for bound in ("value", "low", "high")} | {
            key: done[key] for key in ("learning_rate", "best_step", "steps", "tokens", "search_tokens", "seconds")
        }
    finetuned, distilled = (each["perplexity"] for each in found)
    row["distill / finetune"] = versus(distilled, finetuned)
    return row


def _print(rows: list[dict[str, Any]]) -> None:
    print("| variant | tokens | before | fine-tuned | distilled | distilled / fine-tuned |\n|---|---|---|---|---|---|")
    for row in rows:
        cells = [row["variant"], f"{row['tokens']:,}", f"{row['before']:,.1f}"]
        for entry, digits in ((row["finetune"], 1), (row["distill"], 1), (row["distill / finetune"], 3)):
            cells.append(f"{entry['value']:,.{digits}f} [{entry['low']:,.{digits}f}, {entry['high']:,.{digits}f}]")
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
