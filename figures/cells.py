"""How results are written in the cells of a Markdown table."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from figures.experiments import ROOT
from layerfold.methods import Drop, Share
from layerfold.report import numerals
from layerfold.report.columns import COLUMNS
from layerfold.study.recipe import read_recipe

Show = Callable[[float], str]

POCKET_DEPTH = 12
MINUS = "\N{MINUS SIGN}"
SHOW = {column.name: column.show for column in COLUMNS}


_MARKUP = str.maketrans({each: f"\\{each}" for each in "\\`*_[]|"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;"})


def plain(text: str) -> str:
    """Write text of a model so that Markdown takes none of it for markup, on one line."""
    return " ".join(text.split()).translate(_MARKUP)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figure(row: Mapping[str, Any], name: str) -> str:
    """Write a figure of a study's row, with its interval or its deviation; nothing for a missing figure."""
    value = row.get(name)
    if value is None:
        return ""
    show = SHOW.get(name, numerals.significant)
    deviation = row.get(f"{name}_deviation")
    if deviation:
        return f"{show(value)} \N{PLUS-MINUS SIGN} {show(deviation)}"
    return bounded(value, row.get(f"{name}_low"), row.get(f"{name}_high"), show)


def bounded(value: float, low: float | None, high: float | None, show: Show = numerals.precise) -> str:
    """Write a figure with its interval, if it has one."""
    if low is None or high is None or low == value == high:
        return show(value)
    return f"{show(value)} [{show(low)}, {show(high)}]"


def of(interval: Mapping[str, float], show: Show = numerals.precise) -> str:
    """Write an interval that is a mapping."""
    return bounded(interval["value"], interval.get("low"), interval.get("high"), show)


def study_rows(
    found: Mapping[str, Any], columns: Mapping[str, str], labels: Mapping[str, str] | None = None, first: str = ""
) -> str:
    """Write rows of a study.

    Args:
        columns: headers by the figure's name.
        labels: what the table calls each row, by label; None takes all rows by their own labels.
        first: header of the labels.
    """
    shown = labels or {label: label for label in found["rows"]}
    rows = []
    for label, said in shown.items():
        row = found["rows"][label]
        base = label == "base"
        cells = ["" if base and name in ("perplexity_ratio", "speedup") else figure(row, name) for name in columns]
        rows.append([said, *cells])
    return table([first, *columns.values()], rows)


def published(name: str) -> dict[str, dict[str, str]]:
    """Return a published table: its rows by their first cell."""
    text = files("layerfold").joinpath("published", f"{name}.csv").read_text(encoding="utf-8")
    return {next(iter(row.values())): row for row in csv.DictReader(text.splitlines())}


def chosen_blocks(recipe: str) -> dict[str, list[int]]:
    """Return the blocks that the rows of a recipe drop or share, by label."""
    found = {}
    for variant in read_recipe(ROOT / "recipes" / f"{recipe}.yaml").variants:
        if isinstance(variant.method, Drop) and variant.method.part == "block":
            found[variant.label] = variant.method.indices(POCKET_DEPTH)
        if isinstance(variant.method, Share) and ":" in str(variant.method.window):
            start, size = map(int, variant.method.window.split(":"))
            found[variant.label] = [*range(start, start + size)]
    return found
