"""The HTML page: one file that loads nothing, runs nothing and can be sent to anyone."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from layerfold.records import BASE_LABEL, RECOVERY, Results
from layerfold.report.plots import plot
from layerfold.report.provenance import environments, matched_pairs, other_notes, protocols
from layerfold.report.published import Comparison
from layerfold.report.recovery import section
from layerfold.report.samples import samples_of
from layerfold.report.study import COLUMNS, ZEROS, columns, over_seeds, shows_zeros, table, timing_check
from layerfold.report.template import write_page

PLOTTED = ("parameters", "latency_ms")
"""What perplexity is drawn against."""


def write_html(results: Results, path: Path, published: Sequence[Comparison] = ()) -> None:
    """Write the results as one page: table, plots, recovery, generated text, protocols, notes and environment.

    With comparisons, the published figures stand in a section of their own, beside ours.

    The same results give the same bytes.

    Raises:
        OutputError: the file cannot be written.
    """
    shown = {column.name: column for column in columns(results)}
    across = [shown[name] for name in PLOTTED if name in shown]
    if shows_zeros(results):
        across[0] = shown["nonzero_parameters"]  # as many as the parameters in rows that hold no zeros
    drawings = [plot(results, x, shown["perplexity"]) for x in across] if "perplexity" in shown else []
    recovery = section(results)
    write_page(
        path,
        "report.html.j2",
        kind="report",
        title=results.base,
        summary=_summary(results),
        over_seeds=over_seeds(results),
        timing_check=timing_check(results),
        tables=[table(results, detail) for detail in (False, True)],
        plots=[(drawing, Markup(drawing.svg)) for drawing in drawings],
        published=published,
        recovery=recovery,
        curves=[(drawing, Markup(drawing.svg)) for drawing in recovery.plots] if recovery else [],
        samples=samples_of(results),
        protocols=protocols(results),
        pairs=matched_pairs(results),
        notes=other_notes(results),
        environments=environments(results),
        recipe=json.dumps(results.recipe, indent=2, ensure_ascii=False, default=str),
    )


def _summary(results: Results) -> str:
    """Return one sentence: what was measured, and which variants stand out."""
    named = {column.name: column for column in COLUMNS}
    variants = [label for label in results.labels if label not in (BASE_LABEL, *results.baselines)]
    if not variants:
        return f"Only the base model, {results.base}, was measured."
    findings = []
    for name, pick, least, wording, otherwise in (
        ("perplexity_ratio", min, 0, "{label} comes closest in perplexity{after}, {figure} times the base's", ""),
        ("removed_fraction", max, 0, "{label} is the smallest, with {figure} of the parameters removed", ""),
        # Only what is beyond chance: zeros, for one, make nothing faster on dense kernels.
        ("speedup", max, 1, "{label} is the fastest, {figure} times as fast as the base",
         "none is faster than the base by more than the uncertainty"),
    ):  # fmt: skip
        found = {label: named[name].read(results, label) for label in variants}
        finite = {label: each for label, each in found.items() if each and math.isfinite(each.value)}
        certain = {
            label: each.value for label, each in finite.items() if not each.low <= least
        }  # one window has no bounds
        if certain:
            best = pick(certain, key=certain.__getitem__)
            after = " after recovery" if results.score(best, RECOVERY) else ""
            findings.append(wording.format(label=best, figure=named[name].show(certain[best]), after=after))
        elif finite and otherwise:
            findings.append(otherwise)
    subject = f"{len(variants)} compressed variant{'s' * (len(variants) > 1)} of {results.base} measured beside it"
    caveat = f" {ZEROS[0].upper()}{ZEROS[1:]}." if shows_zeros(results) else ""
    return f"{subject}: {'; '.join(findings)}.{caveat}" if findings else f"{subject}.{caveat}"
