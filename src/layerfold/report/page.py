"""The HTML page: one file that loads nothing, runs nothing and can be sent to anyone."""

from __future__ import annotations

import hashlib
import json
import math
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from layerfold.records import BASE_LABEL, RECOVERY, Results, write_text
from layerfold.report import numerals
from layerfold.report.columns import COLUMNS, MISSING, Cell, Column, columns
from layerfold.report.plots import plot
from layerfold.report.provenance import environments, matched_pairs, other_notes, protocols
from layerfold.report.recovery import section

PLOTTED = (("parameters", "perplexity"), ("latency_ms", "perplexity"))


@dataclass(frozen=True)
class Table:
    """Columns with their cells, by label, as the page shows them."""

    columns: Sequence[Column]
    rows: Sequence[tuple[str, Sequence[Cell]]]


@dataclass(frozen=True)
class Sample:
    """What a variant wrote after a prompt."""

    label: str
    text: str
    repeated: str


def write_html(results: Results, path: Path) -> None:
    """Write the results as one page: table, plots, recovery, generated text, protocols, notes and environment.

    The same results give the same bytes.

    Raises:
        OutputError: the file cannot be written.
    """
    # Half of a surrogate pair, which a recipe in JSON can hold, has no UTF-8.
    write_text(path, _render(results).encode("utf-8", "replace").decode("utf-8"))


def _render(results: Results) -> str:
    template_environment = Environment(
        loader=PackageLoader("layerfold.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template_environment.globals.update(BASE_LABEL=BASE_LABEL, MISSING=MISSING)
    style = files("layerfold.report").joinpath("report.css").read_text(encoding="utf-8")
    shown = {column.name: column for column in columns(results)}
    drawings = [plot(results, shown[x], shown[y]) for x, y in PLOTTED if x in shown and y in shown]
    recovery = section(results)
    return template_environment.get_template("report.html.j2").render(
        base=results.base,
        style=Markup(style),
        style_hash=b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        summary=_summary(results),
        tables=[_table(results, detail) for detail in (False, True)],
        plots=[(drawing, Markup(drawing.svg)) for drawing in drawings],
        recovery=recovery,
        curves=[(drawing, Markup(drawing.svg)) for drawing in recovery.plots] if recovery else [],
        samples=_samples(results),
        protocols=protocols(results),
        pairs=matched_pairs(results),
        notes=other_notes(results),
        environments=environments(results),
        recipe=json.dumps(results.recipe, indent=2, ensure_ascii=False, default=str),
    )


def _table(results: Results, detail: bool) -> Table:
    shown = [column for column in columns(results) if column.detail == detail]
    return Table(shown, [(label, [column.cell(results, label) for column in shown]) for label in results.labels])


def _summary(results: Results) -> str:
    """Return one sentence: what was measured, and which variants stand out."""
    named = {column.name: column for column in COLUMNS}
    variants = [label for label in results.labels if label != BASE_LABEL]
    if not variants:
        return f"Only the base model, {results.base}, was measured."
    findings = []
    for name, pick, wording in (
        ("perplexity_ratio", min, "{label} comes closest in perplexity{after}, {figure} times the base's"),
        ("removed_fraction", max, "{label} is the smallest, with {figure} of the parameters removed"),
        ("speedup", max, "{label} is the fastest, {figure} times as fast as the base"),
    ):
        found = {label: named[name].read(results, label) for label in variants}
        finite = {label: each.value for label, each in found.items() if each and math.isfinite(each.value)}
        if finite:
            best = pick(finite, key=finite.__getitem__)
            after = " after recovery" if results.score(best, RECOVERY) else ""
            findings.append(wording.format(label=best, figure=named[name].show(finite[best]), after=after))
    subject = f"{len(variants)} compressed variant{'s' * (len(variants) > 1)} of {results.base} measured beside it"
    return f"{subject}: {'; '.join(findings)}." if findings else f"{subject}."


def _samples(results: Results) -> list[tuple[str, list[Sample]]]:
    """Return each prompt with what every variant wrote after it."""
    prompts: dict[str, list[Sample]] = {}
    for label in results.labels:
        for sample in (results.score(label, "generation") or {}).get("samples", ()):
            repeated = sample.get("repeated_fraction")
            shown = MISSING if repeated is None else numerals.rough_percent(repeated)
            prompts.setdefault(sample["prompt"], []).append(Sample(label, sample["text"], shown))
    return list(prompts.items())
