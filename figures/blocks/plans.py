"""Blocks of plans, and of other methods beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from figures.blocks.registry import Found, block
from figures.cells import bounded, of, table
from layerfold.report import numerals

# Plans and peers


@block("plan-trials", "plan")
def _plan_trials(found: Found) -> str:
    tried: dict[str, dict[str, Any]] = {}
    for trial in found["trials"]:
        if trial["whole"] or trial["perplexity"] is None:
            continue
        entry = tried.setdefault(_change(trial), {"parameters": trial["parameters"]})
        entry["unrepaired" if trial["repair"] == "none" else "repaired"] = trial["perplexity"]
    ordered = sorted(tried.items(), key=lambda item: -item[1]["parameters"])
    rows = [
        [change, numerals.count(entry["parameters"]),
         *(numerals.precise(entry[name]) if name in entry else "" for name in ("unrepaired", "repaired"))]
        for change, entry in ordered
    ]  # fmt: skip
    return table(["change", "parameters", "unrepaired", "repaired"], rows)


def _change(trial: Mapping[str, Any]) -> str:
    """Say in words what a candidate of a plan changes."""
    said: str = trial["said"]
    # Two candidates may remove as much, one of them alike from every block.
    return said.removesuffix(", repaired") + (", uniform" if _uniform(trial["row"]) else "")


def _uniform(row: Mapping[str, Any]) -> bool:
    steps = row.get("steps", [row])
    return any(each.get("prune", {}).get("uniform", False) for each in steps)


@block("plan-winner", "plan")
def _plan_winner(found: Found) -> str:
    return _winner(found)


@block("plan-speed", "plan-speed")
def _plan_speed(found: Found) -> str:
    return _winner(found)


def _winner(found: Found) -> str:
    winner, base = found["winner"], found["base"]
    speed = of(winner["speedup"], numerals.times) if "speedup" in winner else ""
    rows = [
        ["the model", numerals.count(base["parameters"]), of(base["test"]["perplexity"]), "", ""],
        [_change(winner), numerals.count(winner["parameters"]),
         of(winner["test"]["perplexity"]), of(winner["test"]["versus_base"], numerals.times), speed],
    ]  # fmt: skip
    head = ["", "parameters", "test perplexity", "× base", "speed-up"]
    keep = len(head) if speed else len(head) - 1
    return table(head[:keep], [row[:keep] for row in rows])


@block("quality")
def _quality(found: Found) -> str:
    return _by_size(found, "perplexity")


@block("plot-quality", "quality")
def _plot_quality(found: Found) -> str:
    return "![perplexity against parameters, by method](plots/quality.svg)"


@block("plot-quality-smollm2", "quality-smollm2")
def _plot_quality_smollm2(found: Found) -> str:
    return "![perplexity against parameters, SmolLM2-135M](plots/quality-smollm2.svg)"


@block("quality-recovered", "quality")
def _quality_recovered(found: Found) -> str:
    return _by_size(found, "recovered", intervals=True)


@block("quality-smollm2")
def _quality_smollm2(found: Found) -> str:
    return _by_size(found, "perplexity")


def _by_size(found: Found, name: str, intervals: bool = False) -> str:
    """Write methods by sizes; the lowest of a size is bold, among all and among those that hold no zeros."""
    base, *rows = found["rows"]
    place = {(row["method"], row["kept"]): row for row in rows}
    sizes = [int(kept) for kept in found["sizes"] if any(name in row for row in rows if row["kept"] == int(kept))]
    bold = {
        (min(allowed, key=lambda row: row[name]["value"])["method"], kept)
        for kept in sizes
        for zeros in (False, True)
        if (allowed := [*_of_size(found, rows, kept, name, zeros)])
    }
    written = [["parameters, millions", *(f"{found['sizes'][str(kept)] / 1e6:.2f}" for kept in sizes)]]
    for method, about in found["methods"].items():
        cells = []
        for kept in sizes:
            row = place.get((method, kept), {})
            text = "" if name not in row else _size_cell(row[name], intervals)
            cells.append(f"**{text}**" if (method, kept) in bold else text or "–")
        written.append([about["title"] + (" (zeros)" if about["zeros"] else ""), *cells])
    ratios = []
    for kept in sizes:
        value, low, high = place["layerfold", kept][name]["over base"]
        ratios.append(bounded(value, low, high, numerals.times))
    written.insert(2, ["× base", *ratios])
    said = f"Base: {bounded(*(base['perplexity'][each] for each in ('value', 'low', 'high')))}."
    lines = table(["size, in blocks", *map(str, sizes)], written)
    return f"{lines}\n\n{said} {_closest(found, rows, sizes, name)}".rstrip()


def _size_cell(measured: Mapping[str, Any], intervals: bool) -> str:
    if intervals:
        return of(measured)
    return f"{measured['value']:,.1f}" if measured["value"] < 1000 else f"{measured['value']:,.0f}"


def _of_size(found: Found, rows: Sequence[Found], kept: int, name: str, zeros: bool) -> Iterator[Found]:
    for row in rows:
        if row["kept"] == kept and name in row and (zeros or not found["methods"][row["method"]]["zeros"]):
            yield row


def _closest(found: Found, rows: Sequence[Found], sizes: Sequence[int], name: str) -> str:
    """Say against which methods without zeros the plan's paired interval does not exclude equality."""
    close = []
    for kept in sizes:
        for row in _of_size(found, rows, kept, name, zeros=False):
            over = row[name].get("over plan")
            if over is not None and over[1] <= 1:
                close.append(f"{found['methods'][row['method']]['title']} at {kept}")
    if not any("over plan" in row[name] for row in rows if name in row):
        return ""
    if not close:
        return "Of the methods without zeros, every other one is above the plan by more than the paired 95 % interval."
    return f"Not above the plan by more than the paired 95 % interval: {', '.join(close)}."
