"""The columns of a study: what stands where in the records, under which header, and how it is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from layerfold.files import Json
from layerfold.maths.intervals import Interval
from layerfold.records import BASE_LABEL, RECOVERY, Results
from layerfold.report import numerals
from layerfold.report.report import TIMES_BASE, Column, Direction, certain, same_model

_SPARSE = 0.99
"""A row with fewer of its parameters other than zero has been pruned."""

ZEROS = "zeros alone make nothing faster on dense kernels"
"""What stands wherever a table shows that a row has many."""


@dataclass(frozen=True)
class Measure(Column):
    """One figure of every variant.

    Attributes:
        evaluator, key: where the records hold it; ``value`` is the score's own value, ``tasks/NAME`` that of a task.
        optional: whether it is not shown where no row has the figure.
        detail: whether it is left to the CSV file and the page's second table.
    """

    evaluator: str = ""
    key: str = "value"
    optional: bool = False
    detail: bool = False


def measure(
    name: str,
    title: str,
    unit: str,
    meaning: str,
    evaluator: str,
    key: str = "value",
    show: Callable[[float], str] = numerals.significant,
    better: Direction = "",
    interval: bool = False,
    removed: bool = False,
    detail: bool = False,
    beside: str = "",
    optional: bool = False,
) -> Measure:
    """Return the column of a figure in the records.

    Args:
        removed: whether to read the fraction of the base's value that is gone in place of the value.
        beside: the evaluator among whose columns it stands, and without which it is not shown; empty for its own.
    """

    def read(results: Results, label: str) -> Interval | None:
        found = _read(results.score(label, evaluator), key)
        if not removed or found is None:
            return found
        base = _read(results.score(BASE_LABEL, evaluator), key)
        if base is None or not base.value:
            return None
        fraction = 1 - found.value / base.value
        return replace(certain(fraction), deviation=found.deviation and found.deviation / base.value)

    return Measure(
        title, unit, meaning, read, show, better, interval, beside or evaluator, name, evaluator, key, optional, detail
    )


COLUMNS = (
    measure("blocks", "blocks", "", "transformer blocks left", "size", "blocks", numerals.whole),
    measure("parameters", "parameters", "", "distinct parameters: a shared tensor counts once", "size", "value",
           numerals.count, better="lower"),
    measure("removed_fraction", "removed", "", "share of the base's parameters that is gone", "size", "value",
           numerals.percent, better="higher", removed=True),
    measure("nonzero_parameters", "non-zero", "parameters",
           f"distinct parameters that are not zero; {ZEROS}", "size", "nonzero", numerals.count, better="lower",
           detail=True),
    measure("dense_bytes", "dense", "checkpoint", "size of the plain checkpoint on disk", "size", "bytes",
           numerals.memory, better="lower", detail=True),
    measure("compact_bytes", "compact", "checkpoint", "size of the checkpoint that stores shared tensors once", "size",
           "compact_bytes", numerals.memory, better="lower", detail=True),
    measure("flops_per_token", "FLOPs", "per token", "forward floating-point operations per token at the context used",
           "size", "flops_per_token", numerals.count, better="lower", detail=True),
    measure("perplexity_before", "perplexity", "before",
           "before recovery, perplexity on the test text, with its 95% interval", RECOVERY, "before",
           numerals.precise, "lower", interval=True, beside="perplexity"),
    measure("perplexity", "perplexity", "", "perplexity on the test text, with its 95% interval",
           "perplexity", "value", numerals.precise, "lower", interval=True),
    measure("perplexity_ratio", "perplexity", TIMES_BASE,
           "perplexity divided by the base's, with its 95% interval, paired over the same text",
           "perplexity", "versus_base", numerals.times, better="lower", interval=True),
    measure("bits_per_byte", "bits", "per byte",
           "cross-entropy in bits per byte of raw text, comparable across tokenizers", "perplexity",
           "bits_per_byte", numerals.precise, "lower", detail=True),
    measure("latency_ms", "latency", "ms/token", "median time per generated token, with its quartiles", "latency",
           "value", better="lower", interval=True),
    measure("speedup", "speed-up", TIMES_BASE,
           "how many times faster than the base, with its 95% interval; of the base, that of a copy", "latency",
           "speedup", numerals.times, better="higher", interval=True),
    measure("multiplied_out_ms", "multiplied out", "ms/token",
           "median time per generated token with low-rank deltas multiplied out, with its quartiles", "latency",
           "multiplied_out", better="lower", interval=True, optional=True),
    measure("multiplied_out_speedup", "multiplied out", TIMES_BASE,
           "how many times faster than the base with low-rank deltas multiplied out, with its 95% interval", "latency",
           "multiplied_out_speedup", numerals.times, better="higher", interval=True, optional=True),
    measure("prefill_ms", "prefill", "ms", "median time to read the prompt, with its quartiles", "latency", "prefill",
           better="lower", interval=True, detail=True),
    measure("repeated_4grams", "repeated", "4-grams",
           "mean fraction of 4-grams of the generated text that occurred before in it, with its interval", "generation",
           "value", numerals.rough_percent, "lower", interval=True),
    measure("imdb_accuracy", "accuracy", "",
           "share of test texts that a classifier made of the model labels rightly, with its 95% Wilson interval",
           "imdb", "value", numerals.percent, "higher", interval=True),
    measure("imdb_largest_class", "largest class", "",
           "share of the test texts with the commonest label: the accuracy of answering that always",
           "imdb", "largest_class", numerals.percent, optional=True),
    measure("imdb_difference", "accuracy", "less the base's",
           "accuracy less the base's, with its 95% interval, paired over the same texts",
           "imdb", "versus_base", numerals.percent, "higher", interval=True, detail=True),
    *(
        measure(key.lower(), f"ROUGE-{key[5:]}", "",
               f"mean ROUGE-{key[5:]} F1 of the summaries, with its 95% interval over documents",
               "rouge", key, numerals.percent, "higher", interval=True)
        for key in ("rouge1", "rouge2", "rougeL")
    ),
    measure("rouge_empty", "empty", "summaries", "summaries in which nothing was written; they score 0", "rouge",
           "empty", numerals.whole, "lower", detail=True),
    measure("recovery_tokens", "recovery", "tokens", "tokens that recovery trained on", RECOVERY, "tokens",
           numerals.count),
    measure("recovery_seconds", "recovery", "seconds", "time that recovery took, choosing the learning rate included",
           RECOVERY, "seconds"),
    measure("recovery_validation_perplexity", "recovery", "validation perplexity",
           "perplexity of the weights kept on the validation text that they were chosen by", RECOVERY, "value",
           numerals.precise, "lower", detail=True),
    measure("recovery_parameters", "recovery", "parameters trained",
           "distinct parameters that were trained, those that were frozen left out", RECOVERY, "parameters_trained",
           numerals.count, detail=True),
    measure("recovery_learning_rate", "recovery", "learning rate", "learning rate at its highest", RECOVERY,
           "learning_rate", numerals.plain, detail=True),
    measure("recovery_search_tokens", "recovery", "search tokens",
           "further tokens that choosing the learning rate took", RECOVERY, "search_tokens", numerals.count,
           detail=True),
    measure("recovery_best_step", "recovery", "best step",
           "the step whose weights were kept; 0 stands for the weights before training", RECOVERY, "best_step",
           numerals.whole, detail=True),
)  # fmt: skip


def columns(results: Results) -> tuple[Measure, ...]:
    """Return the columns of these results: those of known evaluators, then one for each of the others, or its tasks."""
    known = {column.evaluator for column in COLUMNS}
    measured = set(results.evaluators)
    return (
        *(_qualified(results, column) for column in COLUMNS if _shown(results, column, measured)),
        *(column for name in results.evaluators if name not in known for column in _others(results, name)),
    )


def _shown(results: Results, column: Measure, measured: set[str]) -> bool:
    if not {column.evaluator, column.group} <= measured:
        return False
    return not column.optional or any(column.read(results, label) is not None for label in results.labels)


def over_seeds(results: Results) -> bool:
    """Whether any figure is the mean over several seeds."""
    return any("deviation" in record.score for record in results.records.values())


def timing_check(results: Results) -> str:
    """Say how far the base and a copy of it came out apart, where models were timed beside each other."""
    checks = dict.fromkeys(_read(results.score(label, "latency"), "same_model") for label in results.labels)
    return same_model([check for check in checks if check is not None])


def shows_zeros(results: Results) -> bool:
    """Whether the first table shows how many parameters are not zero."""
    return any(column.key == "nonzero" and not column.detail for column in columns(results))


def _qualified(results: Results, column: Measure) -> Measure:
    """Say in the header what the figures are of: the published protocols, models after recovery.

    Published figures must not pass for sound ones. Zeros are worth a look where there are many.
    """
    scores = [results.score(label, column.group) or {} for label in results.labels]
    published = next((score for score in scores if score.get("protocol") == "published"), None)
    if published is not None and column.group != column.evaluator:
        column = replace(column, unit=f"{column.unit}, published")
    elif published is not None and column.key == "value":
        unit = str(published.get("unit", column.unit)) if column.unit else ""
        column = replace(column, unit=f"{unit} published".strip())
    if column.evaluator == "perplexity" and RECOVERY in results.evaluators:
        units = ("after", column.unit) if column.key == "value" else (column.unit,)
        column = replace(column, unit=", ".join(filter(None, units)), meaning=f"after recovery, {column.meaning}")
    if column.key == "nonzero" and any(score["nonzero"] < _SPARSE * score["value"] for score in scores if score):
        column = replace(column, detail=False)
    return column


def _others(results: Results, evaluator: str) -> list[Measure]:
    """One column for each task of an evaluator that has tasks, or one for all of an evaluator that has not."""
    scores = [results.score(label, evaluator) or {} for label in results.labels]
    tasks = {name: task for score in scores for name, task in score.get("tasks", {}).items()}
    return [_task(evaluator, name, task) for name, task in tasks.items()] or [_generic(results, evaluator)]


def _task(evaluator: str, name: str, task: Mapping[str, Json]) -> Measure:
    what = f"{task['metric']} of {name} {task['version']}, {task['num_fewshot'] or 0} examples a prompt"
    return measure(
        name=f"{evaluator.replace('-', '_')}_{name}",
        title=name,
        unit=task["metric"],
        meaning=f"{what}, {task['samples']} documents, with its 95% interval",
        evaluator=evaluator,
        key=f"tasks/{name}",
        show=numerals.percent if task["unit"] == "fraction" else numerals.precise,
        better="lower" if task["lower_is_better"] else "higher",
        interval=True,
    )


def _generic(results: Results, evaluator: str) -> Measure:
    scores = (results.score(label, evaluator) for label in results.labels)
    score = next((score for score in scores if score is not None), {})
    unit = str(score.get("unit", ""))
    directions: dict[Json, Direction] = {True: "lower", False: "higher"}
    return measure(
        name=evaluator,
        title=evaluator,
        unit="" if unit == evaluator else unit,
        meaning=f"{evaluator}, with its interval",
        evaluator=evaluator,
        better=directions.get(score.get("lower_is_better"), ""),
        interval=True,
    )


def _read(score: Mapping[str, Json] | None, key: str) -> Interval | None:
    entry: Json = score
    for part in () if key == "value" else key.split("/", 1):
        entry = entry.get(part) if isinstance(entry, Mapping) else None
    bounds = entry if isinstance(entry, Mapping) else {"value": entry}
    value = bounds.get("value")
    if value is None:
        return None
    low, high = bounds.get("low"), bounds.get("high")
    return Interval(value, value if low is None else low, value if high is None else high, bounds.get("deviation"))
