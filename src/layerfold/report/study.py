"""The report of a study."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence

from layerfold.records import BASE_LABEL, RECOVERY, Results
from layerfold.report import numerals
from layerfold.report.columns import COLUMNS, ZEROS, columns, over_seeds, shows_zeros, timing_check
from layerfold.report.curves import recovery_parts
from layerfold.report.plots import plot
from layerfold.report.provenance import environments, matched_pairs, other_notes, protocols
from layerfold.report.published import Comparison, published_report, published_sections
from layerfold.report.report import (
    MISSING,
    PLUS_MINUS,
    Code,
    Details,
    Line,
    Plot,
    Plots,
    Printed,
    Report,
    Sample,
    Samples,
    Section,
    Table,
    figures,
    sentence,
    summed_up,
    table_of,
)

PLOTTED = ("parameters", "latency_ms")
"""What perplexity is drawn against."""


def study_report(results: Results, published: Sequence[Comparison] = ()) -> Report:
    """Return a study's report: table, plots, recovery, generated text, protocols, notes and environment.

    With comparisons, the published figures stand beside ours: below the table, and in sections of the page.
    """
    shown, seeds = columns(results), over_seeds(results)
    rows = [{"label": label, **figures(shown, results, label, seeds)} for label in results.labels]
    printed: list[Printed] = [table(results), *_notes(results)]
    if published:
        printed += [Line(""), *published_report(published).printed]
    return Report("report", results.base, _summary(results), printed, rows, [*_sections(results, published)])


def samples_report(results: Results) -> Report:
    """Return what every variant wrote, for the terminal; the page has it in the study's report."""
    note = Line(f"{_choices(results)} beside each text the share of its 4-grams that occurred before in it")
    return Report("report", results.base, "", [samples_of(results), note], [], [])


def table(results: Results, detail: bool = False) -> Table:
    """Return the table of these results: the columns of the first, or the details."""
    chosen = [column for column in columns(results) if column.detail == detail]
    recovered = any(results.score(label, RECOVERY) is not None for label in results.labels)
    if detail:
        what = "Storage, work, time and training" if recovered else "Storage, work and time"
        name, caption = "further", f"{what} beyond the first table.{_of_seeds(results)}"
    else:
        each = f"Each figure stands above its 95% interval; a time, above its quartiles.{_of_seeds(results)}"
        name, caption = "results", f"{each}{sentence(timing_check(results))}"
    return table_of(results, chosen, results.labels, str, "variant", BASE_LABEL, name, caption)


def samples_of(results: Results) -> Samples:
    """Return each prompt with what every variant wrote after it."""
    prompts: dict[str, list[Sample]] = {}
    for label in results.labels:
        for sample in (results.score(label, "generation") or {}).get("samples", ()):
            entries = prompts.setdefault(sample["prompt"], [])
            for choice, written in (("greedy", sample), ("sampled", sample.get("sampled"))):
                if written is not None:  # a run of generation-2 has greedy texts alone
                    repeated = written.get("repeated_fraction")
                    shown = MISSING if repeated is None else numerals.rough_percent(repeated)
                    entries.append(Sample(label, choice, written["text"], shown))
    return Samples([*prompts.items()], BASE_LABEL)


def _choices(results: Results) -> str:
    """Say how tokens were chosen."""
    score = next(filter(None, (results.score(label, "generation") for label in results.labels)), {})
    if "top_p" not in score:
        return ""
    drawn = f"top-p {score['top_p']}, temperature {score['temperature']}, seed {score['seed']}"
    return f"greedy: always the likeliest token; sampled: {drawn}, the same random numbers for all;"


def _of_seeds(results: Results) -> str:
    mean = " Over several seeds, a figure is the mean, above its standard deviation (\N{PLUS-MINUS SIGN})."
    return mean if over_seeds(results) else ""


def _notes(results: Results) -> list[Line]:
    """Return what the terminal says below the table, in one line."""
    printed = [column for column in columns(results) if not column.detail]
    notes = [
        "95% intervals below the values" if any(column.interval for column in printed) else "",
        f"{PLUS_MINUS} the standard deviation over seeds" if over_seeds(results) else "",
        "quartiles below ms/token" if any(column.name == "latency_ms" for column in printed) else "",
        timing_check(results),
        ZEROS if shows_zeros(results) else "",
    ]
    return [Line("; ".join(filter(None, notes)))] if any(notes) else []


def _sections(results: Results, published: Sequence[Comparison]) -> Iterator[Section]:
    seeds = over_seeds(results)
    yield Section("results", "Results", [table(results)])
    if drawings := _plots(results):
        bars = "the 95% intervals of the means over seeds" if seeds else "the intervals of the table"
        note = f"Towards the lower left is better. Bars are {bars}; the dashed line is the base’s perplexity."
        plots = Plots(drawings, "no variant has both figures", wide=False)
        yield Section("plots", "Trade-offs", [plots, Line(note)])
    yield from published_sections(published, _of_seeds(results))
    if recovery := recovery_parts(results, seeds):
        yield Section("recovery", "Recovery", recovery)
    samples = samples_of(results)
    if samples.prompts:
        first = " Texts are those of the first seed." if seeds else ""
        chosen = sentence(_choices(results).rstrip(";"))
        note = f"The same prompt for every variant.{chosen} The percentage is the share of repeated 4-grams.{first}"
        yield Section("samples", "What they write", [Line(note), samples])
    further = table(results, detail=True)
    if further.columns:
        yield Section("further", "Further figures", [further])
    pairs = matched_pairs(results)
    if pairs.rows:
        yield Section("pairs", "Matched neurons", [pairs])
    if notes := other_notes(results):
        yield Section("notes", "Notes", notes)
    yield Section("protocols", "How it was measured", [protocols(results)])
    made_in = environments(results)
    count = len(made_in.cards)
    differ = f"Figures come from {count} environments; times are comparable only within one."
    warning = [Line(differ, "warning")] if count > 1 else []
    recipe = json.dumps(results.recipe, indent=2, ensure_ascii=False, default=str)
    yield Section("environment", "Environment", [*warning, made_in, Details("Recipe", [Code(recipe)])])


def _plots(results: Results) -> list[Plot]:
    shown = {column.name: column for column in columns(results)}
    across = [shown[name] for name in PLOTTED if name in shown]
    if shows_zeros(results):
        across[0] = shown["nonzero_parameters"]  # as many as the parameters in rows that hold no zeros
    return [plot(results, x, shown["perplexity"]) for x in across] if "perplexity" in shown else []


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
        # One window has no bounds.
        beyond = {label: each.value for label, each in finite.items() if not each.low <= least}
        if beyond:
            best = pick(beyond, key=beyond.__getitem__)
            after = " after recovery" if results.score(best, RECOVERY) else ""
            findings.append(wording.format(label=best, figure=named[name].show(beyond[best]), after=after))
        elif finite and otherwise:
            findings.append(otherwise)
    subject = f"{len(variants)} compressed variant{'s' * (len(variants) > 1)} of {results.base} measured beside it"
    return summed_up(subject, findings) + sentence(ZEROS * shows_zeros(results))
