"""The columns of a study: where the records hold each figure, its header, and how it is written."""

from __future__ import annotations

from collections.abc import Mapping
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
class Scored:
    """Reads a figure of a variant from the records.

    Attributes:
        evaluator, key: where the records hold it; ``value`` is the score's own value, ``tasks/NAME`` that of a task.
    """

    evaluator: str
    key: str = "value"

    def __call__(self, results: Results, label: str) -> Interval | None:
        """Return the figure, or None where it has not been measured."""
        entry: Json = results.score(label, self.evaluator)
        for part in () if self.key == "value" else self.key.split("/", 1):
            entry = entry.get(part) if isinstance(entry, Mapping) else None
        bounds = entry if isinstance(entry, Mapping) else {"value": entry}
        value = bounds.get("value")
        if value is None:
            return None
        low, high = bounds.get("low"), bounds.get("high")
        return Interval(value, value if low is None else low, value if high is None else high, bounds.get("deviation"))


class Removed(Scored):
    """Reads the fraction of the base's figure that is gone."""

    def __call__(self, results: Results, label: str) -> Interval | None:
        """Return the fraction, or None where it is not known."""
        left, base = super().__call__(results, label), super().__call__(results, BASE_LABEL)
        if left is None or base is None or not base.value:
            return None
        return replace(certain(1 - left.value / base.value), deviation=left.deviation and left.deviation / base.value)


@dataclass(frozen=True)
class Measure(Column):
    """One figure of every variant.

    Attributes:
        group: the evaluator beside whose columns it stands, which must have run too; its own by default.
        optional: whether it is left out if no row has the figure.
        detail: whether it is left to the CSV file and the page's second table.
    """

    read: Scored
    optional: bool = False
    detail: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "group", self.group or self.evaluator)

    @property
    def evaluator(self) -> str:
        """What measures it."""
        return self.read.evaluator

    @property
    def key(self) -> str:
        """Where the evaluator's records hold it."""
        return self.read.key


COLUMNS = (
    Measure("blocks", "blocks", "", "transformer blocks left", Scored("size", "blocks"), numerals.whole),
    Measure("parameters", "parameters", "", "distinct parameters: a shared tensor counts once", Scored("size"),
        numerals.count, "lower"),
    Measure("removed_fraction", "removed", "", "share of the base's parameters that is gone", Removed("size"),
        numerals.percent, "higher"),
    Measure("nonzero_parameters", "non-zero", "parameters", f"distinct parameters that are not zero; {ZEROS}",
        Scored("size", "nonzero"), numerals.count, "lower", detail=True),
    Measure("dense_bytes", "dense", "checkpoint", "size of the plain checkpoint on disk", Scored("size", "bytes"),
        numerals.memory, "lower", detail=True),
    Measure("compact_bytes", "compact", "checkpoint", "size of the checkpoint that stores shared tensors once",
        Scored("size", "compact_bytes"), numerals.memory, "lower", detail=True),
    Measure("flops_per_token", "FLOPs", "per token", "forward floating-point operations per token at the context used",
        Scored("size", "flops_per_token"), numerals.count, "lower", detail=True),
    Measure("perplexity_before", "perplexity", "before",
        "before recovery, perplexity on the test text, with its 95% interval", Scored(RECOVERY, "before"),
        numerals.precise, "lower", interval=True, group="perplexity"),
    Measure("perplexity", "perplexity", "", "perplexity on the test text, with its 95% interval", Scored("perplexity"),
        numerals.precise, "lower", interval=True),
    Measure("perplexity_ratio", "perplexity", TIMES_BASE,
        "perplexity divided by the base's, with its 95% interval, paired over the same text",
        Scored("perplexity", "versus_base"), numerals.times, "lower", interval=True),
    Measure("bits_per_byte", "bits", "per byte",
        "cross-entropy in bits per byte of raw text, comparable across tokenizers",
        Scored("perplexity", "bits_per_byte"), numerals.precise, "lower", detail=True),
    Measure("latency_ms", "latency", "ms/token", "median time per generated token, with its quartiles",
        Scored("latency"), better="lower", interval=True),
    Measure("speedup", "speed-up", TIMES_BASE,
        "how many times faster than the base, with its 95% interval; of the base, that of a copy",
        Scored("latency", "speedup"), numerals.times, "higher", interval=True),
    Measure("multiplied_out_ms", "multiplied out", "ms/token",
        "median time per generated token with low-rank deltas multiplied out, with its quartiles",
        Scored("latency", "multiplied_out"), better="lower", interval=True, optional=True),
    Measure("multiplied_out_speedup", "multiplied out", TIMES_BASE,
        "how many times faster than the base with low-rank deltas multiplied out, with its 95% interval",
        Scored("latency", "multiplied_out_speedup"), numerals.times, "higher", interval=True, optional=True),
    Measure("captured_ms", "captured", "ms/token",
        "median time per generated token with the step captured in a CUDA graph, with its quartiles",
        Scored("latency", "captured"), better="lower", interval=True, optional=True),
    Measure("captured_speedup", "captured", TIMES_BASE,
        "how many times faster than the base with the step captured in a CUDA graph, with its 95% interval",
        Scored("latency", "captured_speedup"), numerals.times, "higher", interval=True, optional=True),
    Measure("prefill_ms", "prefill", "ms", "median time to read the prompt, with its quartiles",
        Scored("latency", "prefill"), better="lower", interval=True, detail=True),
    Measure("repeated_4grams", "repeated", "4-grams",
        "mean fraction of 4-grams of the generated text that occurred before in it, with its interval",
        Scored("generation"), numerals.rough_percent, "lower", interval=True),
    Measure("imdb_accuracy", "accuracy", "",
        "share of test texts that a classifier made of the model labels rightly, with its 95% Wilson interval",
        Scored("imdb"), numerals.percent, "higher", interval=True),
    Measure("imdb_largest_class", "largest class", "",
        "share of the test texts with the commonest label: the accuracy of answering that always",
        Scored("imdb", "largest_class"), numerals.percent, optional=True),
    Measure("imdb_difference", "accuracy", "less the base's",
        "accuracy less the base's, with its 95% interval, paired over the same texts", Scored("imdb", "versus_base"),
        numerals.percent, "higher", interval=True, detail=True),
    *(
        Measure(key.lower(), f"ROUGE-{key[5:]}", "",
            f"mean ROUGE-{key[5:]} F1 of the summaries, with its 95% interval over documents", Scored("rouge", key),
            numerals.percent, "higher", interval=True)
        for key in ("rouge1", "rouge2", "rougeL")
    ),
    Measure("rouge_empty", "empty", "summaries", "summaries in which nothing was written; they score 0",
        Scored("rouge", "empty"), numerals.whole, "lower", detail=True),
    Measure("recovery_tokens", "recovery", "tokens", "tokens that recovery trained on", Scored(RECOVERY, "tokens"),
        numerals.count),
    Measure("recovery_seconds", "recovery", "seconds", "time that recovery took, choosing the learning rate included",
        Scored(RECOVERY, "seconds")),
    Measure("recovery_validation_perplexity", "recovery", "validation perplexity",
        "perplexity of the weights kept on the validation text that they were chosen by", Scored(RECOVERY),
        numerals.precise, "lower", detail=True),
    Measure("recovery_parameters", "recovery", "parameters trained",
        "distinct parameters that were trained, those that were frozen left out",
        Scored(RECOVERY, "parameters_trained"), numerals.count, detail=True),
    Measure("recovery_learning_rate", "recovery", "learning rate", "learning rate at its highest",
        Scored(RECOVERY, "learning_rate"), numerals.plain, detail=True),
    Measure("recovery_search_tokens", "recovery", "search tokens",
        "further tokens that choosing the learning rate took", Scored(RECOVERY, "search_tokens"), numerals.count,
        detail=True),
    Measure("recovery_best_step", "recovery", "best step",
        "the step whose weights were kept; 0 stands for the weights before training", Scored(RECOVERY, "best_step"),
        numerals.whole, detail=True),
)  # fmt: skip


def columns(results: Results) -> tuple[Measure, ...]:
    """Return the columns of results: those of layerfold's evaluators, then one for each other evaluator or task."""
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
    """Compare the speed of the base with that of a copy; empty if models were not timed side by side."""
    checks = dict.fromkeys(Scored("latency", "same_model")(results, label) for label in results.labels)
    return same_model([check for check in checks if check is not None])


def shows_zeros(results: Results) -> bool:
    """Whether the first table shows how many parameters are not zero."""
    return any(column.key == "nonzero" and not column.detail for column in columns(results))


def _qualified(results: Results, column: Measure) -> Measure:
    """Add to a header that figures are by the published protocol, or of models after recovery.

    Figures by the published protocol must not pass for sound ones. Zeros are shown if a row has many.
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
    """Return a column for each task of an evaluator, or one column if it has no tasks."""
    scores = [results.score(label, evaluator) or {} for label in results.labels]
    tasks = {name: task for score in scores for name, task in score.get("tasks", {}).items()}
    return [_task(evaluator, name, task) for name, task in tasks.items()] or [_generic(results, evaluator)]


def _task(evaluator: str, name: str, task: Mapping[str, Json]) -> Measure:
    what = f"{task['metric']} of {name} {task['version']}, {task['num_fewshot'] or 0} examples a prompt"
    return Measure(
        f"{evaluator.replace('-', '_')}_{name}",
        title=name,
        unit=task["metric"],
        meaning=f"{what}, {task['samples']} documents, with its 95% interval",
        read=Scored(evaluator, f"tasks/{name}"),
        show=numerals.percent if task["unit"] == "fraction" else numerals.precise,
        better="lower" if task["lower_is_better"] else "higher",
        interval=True,
    )


def _generic(results: Results, evaluator: str) -> Measure:
    scores = (results.score(label, evaluator) for label in results.labels)
    score = next((score for score in scores if score is not None), {})
    unit = str(score.get("unit", ""))
    directions: dict[Json, Direction] = {True: "lower", False: "higher"}
    return Measure(
        evaluator,
        title=evaluator,
        unit="" if unit == evaluator else unit,
        meaning=f"{evaluator}, with its interval",
        read=Scored(evaluator),
        better=directions.get(score.get("lower_is_better"), ""),
        interval=True,
    )
