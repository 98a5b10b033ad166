"""What the page says of recovery: a sentence on what was done, and training curves, one line a variant."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from statistics import fmean

from matplotlib.axes import Axes

from layerfold.files import Json
from layerfold.records import BASE_LABEL, RECOVERY, Results
from layerfold.report import drawing, numerals
from layerfold.report.drawing import Ends, Style, family
from layerfold.report.placement import spread
from layerfold.report.report import DASH, MISSING, Details, Line, Listing, Part, Plot, Plots

METHODS = {"distill": "distillation", "finetune": "fine-tuning"}
TITLE = "Perplexity during recovery"
GAP = 10.0
# More of them, each of one batch, are a band of noise.
TRAINING_POINTS = 60
# Worse than a guess among all tokens of the largest vocabularies: the scale would leave nothing to see of the others.
MOST_NATS = 16.0
MOST_TOKENS = 1e18
MARKED: Style = {"marker": "o", "zorder": 3}
VALIDATION = MARKED | {"linewidth": 1.8, "markersize": 5.0, "markeredgecolor": drawing.CARD}
TRAINING: Style = {"linewidth": 1.0, "alpha": 0.35, "zorder": 2}
KEPT = MARKED | {"linestyle": "", "markersize": 7.5, "markeredgewidth": 1.8, "markerfacecolor": drawing.CARD}

Curve = list[tuple[float, float]]
"""Tokens with the perplexity after them; both nan where they cannot be drawn, which leaves a gap in the line."""


@dataclass(frozen=True)
class _Run:
    label: str
    family: str
    training: Curve
    validation: Curve

    @property
    def drawn(self) -> Curve:
        """The validation points that can be drawn."""
        return [point for point in self.validation if math.isfinite(point[1])]

    @property
    def whole(self) -> bool:
        """Whether every point can be drawn."""
        return all(math.isfinite(perplexity) for _, perplexity in chain(self.training, self.validation))


Score = dict[str, Json]


def recovery_parts(results: Results, seeds: bool) -> list[Part]:
    """Return the page's parts on recovery, none if no model was recovered; `seeds`: whether there were several."""
    found = {label: results.score(label, RECOVERY) for label in results.labels}
    scores = {label: score for label, score in found.items() if score is not None}
    if not scores:
        return []
    lines = ["Validation text is not the test text of the tables: its perplexities are others."]
    lines += ["Curves are those of the first seed."] if seeds else []
    if unimproved := [label for label, score in scores.items() if score.get("best_step") == 0]:
        lines.append(f"Training never beat the weights it began with, which are kept: {', '.join(unimproved)}.")
    plots = Plots(curves(results), "no run has a validation loss in the scale’s range")
    parts: list[Part] = [Line(_sentence(results, scores)), plots, *map(Line, lines)]
    tried = [(label, _trials(trials)) for label, score in scores.items() if (trials := score.get("learning_rates"))]
    if tried:
        note = Line("Each with the perplexity on validation text at the end of its trial run.")
        parts.append(Details("Learning rates tried", [note, Listing(tried)]))
    return parts


def curves(results: Results) -> list[Plot]:
    """Draw the runs of all variants in drawings of a few, each with the base and on the same scales.

    A loss that is not finite, or out of range, cannot be drawn: the plot's note names the variant.
    """
    runs = []
    for label in results.labels:
        found = (results.score(label, RECOVERY) or {}).get("curve")
        if found:
            training, validation = found.get("train") or (), found.get("validation") or ()
            name = numerals.printable(label)
            runs.append(_Run(name, family(results, label), _curve(training, TRAINING_POINTS), _curve(validation)))
    shown = _panels(runs)
    limits = _limits([point for run in runs for point in (*run.training, *run.drawn) if run.drawn])
    plots = []
    for index, panel in enumerate(shown):
        families = dict.fromkeys(run.family for run in panel if run.label != BASE_LABEL)
        title = f"{TITLE}: {', '.join(families)}" if len(shown) > 1 else TITLE
        drawable = [run for run in panel if run.drawn]
        name = f"{RECOVERY}-{index}"
        plots.append(drawing.plot(name, title, _note(panel), _chart(drawable, *limits) if drawable else None))
    return plots


def _curve(pairs: Sequence[Sequence[Json]], most: int | None = None) -> Curve:
    """Return the points of a curve, averaged to at most `most` points."""
    valid = [
        (tokens, nats) if _within(tokens, MOST_TOKENS) and _within(nats, MOST_NATS) else (math.nan, math.nan)
        for tokens, nats in pairs
    ]
    count = min(most or len(valid), len(valid))
    ends = [index * len(valid) // count for index in range(count + 1)] if count else []
    parts = (_columns(valid[start:end]) for start, end in pairwise(ends))
    return [(fmean(tokens), math.exp(fmean(nats))) for tokens, nats in parts]


def _within(value: Json, most: float) -> bool:
    return isinstance(value, int | float) and 0 <= value <= most


def _panels(runs: Sequence[_Run]) -> list[list[_Run]]:
    """Divide the runs among panels that have a colour for each, families together where possible."""
    base = [run for run in runs if run.label == BASE_LABEL]
    families: dict[str, list[_Run]] = {}
    for run in runs:
        if run.label != BASE_LABEL:
            families.setdefault(run.family, []).append(run)
    found: list[list[_Run]] = []
    for part in map(list, chain.from_iterable(map(drawing.panels, families.values()))):
        if found and len(found[-1]) + len(part) <= len(drawing.SERIES):
            found[-1] += part
        else:
            found.append(part)
    return [base + panel for panel in found or [[]] if base or panel]


def _limits(points: Curve) -> tuple[Ends, Ends]:
    """Return the ends of both axes, with room for the markers."""
    finite = [point for point in points if math.isfinite(point[1])] or [(0.0, 1.0)]
    most = max(tokens for tokens, _ in finite) or 10.0
    low, high = (choose(perplexity for _, perplexity in finite) for choose in (min, max))
    room = max(1.1, (high / low) ** 0.05)
    return (-0.04 * most, 1.04 * most), (low / room, high * room)


def _note(panel: Sequence[_Run]) -> str:
    gaps = [run.label for run in panel if run.drawn and not run.whole]
    return drawing.left_out(
        ("Not drawn, no validation loss being in the scale's range", [run.label for run in panel if not run.drawn]),
        ("Drawn without the losses that are out of range", gaps),
    )


def _chart(runs: Sequence[_Run], across: Ends, up: Ends) -> drawing.Chart:
    series = iter(drawing.SERIES)
    colours = [drawing.INK if run.label == BASE_LABEL else next(series) for run in runs]

    def paint(axes: Axes) -> dict[str, Style]:
        for run, colour in zip(runs, colours, strict=True):
            axes.plot(*_columns(run.training), color=colour, **TRAINING)
            axes.plot(*_columns(run.validation), color=colour, **VALIDATION)
            axes.plot(*_columns([_kept(run)]), color=colour, **KEPT)
        return {"validation text": VALIDATION, "training text": TRAINING, "weights kept": KEPT}

    def label(axes: Axes) -> None:
        area = axes.bbox
        last = [run.drawn[-1] for run in runs]
        points = drawing.on_page(axes, *_columns(last))
        heights = spread([y for _, y in points], 1.25 * drawing.FONT_SIZE, area.y0, area.y1)
        for run, colour, point, (x, y), height in zip(runs, colours, last, points, heights, strict=True):
            drawing.annotate(axes, _ends(run.label), point, (area.x1 + GAP - x, height - y), "left", colour)

    room = GAP + max(drawing.width(_ends(run.label)) for run in runs)
    x, y = drawing.Axis("training tokens", numerals.count, across), drawing.Axis("perplexity", numerals.precise, up)
    return drawing.Chart(x, y, paint, label, "the table has the perplexity before and after", room)


def _ends(label: str) -> str:
    """Cut a label in the middle: variants of one family often differ in the last letters alone."""
    kept = (drawing.LABEL_LENGTH - 1) // 2
    return label if len(label) <= drawing.LABEL_LENGTH else f"{label[:kept]}…{label[-kept:]}"


def _columns(curve: Curve) -> tuple[list[float], list[float]]:
    return [tokens for tokens, _ in curve], [perplexity for _, perplexity in curve]


def _kept(run: _Run) -> tuple[float, float]:
    """Return the point of the weights kept: the first with the lowest validation perplexity."""
    return min(run.drawn, key=lambda point: point[1])


def _sentence(results: Results, scores: dict[str, Score]) -> str:
    models = len(results.labels) - len(results.baselines)
    who = "Every model" if len(scores) == models else f"{len(scores)} of the {models} models"
    who += ", the base included," if BASE_LABEL in scores and len(scores) > 1 else ""
    methods = dict.fromkeys(str(score.get("method")) for score in scores.values())
    how = " or ".join(METHODS.get(method, method) for method in methods)
    if any(score.get("search_tokens") for score in scores.values()):
        further = _span(scores, "search_tokens", numerals.count)
        rate = f"a learning rate chosen on validation text in trial runs ({further} further tokens)"
    else:
        rate = f"a learning rate of {_span(scores, 'learning_rate', numerals.plain)}, given by the recipe"
    return (
        f"{who} went through {how} on {_span(scores, 'tokens', numerals.count)} tokens at {rate}; "
        "of each run, the weights that did best on validation text are kept."
    )


def _span(scores: dict[str, Score], key: str, show: Callable[[float], str]) -> str:
    """Write the values of all models: one, or the least and the most."""
    values = [score[key] for score in scores.values() if score.get(key) is not None]
    ends = dict.fromkeys(show(choose(values)) for choose in (min, max)) if values else [MISSING]
    return DASH.join(ends)


def _trials(trials: Sequence[Score]) -> str:
    """Write each learning rate with the validation perplexity at the end of its trial."""
    return "; ".join(
        f"{numerals.plain(trial['learning_rate'])}: "
        + ("diverged" if trial["validation"] is None else numerals.precise(trial["validation"]))
        for trial in trials
    )
