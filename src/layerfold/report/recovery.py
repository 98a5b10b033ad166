"""What the page says of recovery: what was done, in a sentence, and how it went, in drawings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from layerfold.files import Json
from layerfold.records import BASE_LABEL, RECOVERY, Results
from layerfold.report import numerals
from layerfold.report.curves import curves
from layerfold.report.drawing import Plot
from layerfold.report.provenance import Listing
from layerfold.report.tables import DASH, MISSING

METHODS = {"distill": "distillation", "finetune": "fine-tuning"}

Score = dict[str, Json]


@dataclass(frozen=True)
class Section:
    """The page's section on recovery.

    Attributes:
        sentence: what was done to all models.
        unimproved: labels of the models that training did not improve.
        plots: the training curves.
        tried: the learning rates tried and the validation perplexity at the end of each trial, by label.
    """

    sentence: str
    unimproved: Sequence[str]
    plots: Sequence[Plot]
    tried: Listing


def section(results: Results) -> Section | None:
    """Return what there is to say of recovery; None where no model has been through it."""
    found = {label: results.score(label, RECOVERY) for label in results.labels}
    scores = {label: score for label, score in found.items() if score is not None}
    if not scores:
        return None
    return Section(
        sentence=_sentence(results, scores),
        unimproved=[label for label, score in scores.items() if score.get("best_step") == 0],
        plots=curves(results),
        tried=[(label, _trials(trials)) for label, score in scores.items() if (trials := score.get("learning_rates"))],
    )


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
