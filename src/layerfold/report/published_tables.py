"""The published tables and how they were measured, for `layerfold.report.published`."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from importlib.resources import files

from layerfold.records import BASE_LABEL, RECOVERY
from layerfold.report import numerals
from layerfold.report.columns import COLUMNS, Measure, Scored
from layerfold.report.report import TIMES_BASE


@dataclass(frozen=True)
class Metric:
    """A figure that was published.

    Attributes:
        name: in files.
        title: above its columns.
        tables, column: the packaged files that hold it, and where in them.
        ours: the columns of a study that stand beside it.
        unit: of the published figure, in the header.
        sign: follows the published figure where it is shown.
        convert: converts our figure to the published unit, for files; people read both with their signs.
    """

    name: str
    title: str
    tables: Sequence[str]
    column: str
    ours: Sequence[Measure]
    unit: str = ""
    sign: str = ""
    convert: Callable[[float], float] = float

    @property
    def evaluator(self) -> str:
        """What measures ours."""
        return next(column.evaluator for column in self.ours if column.evaluator != RECOVERY)

    def figures(self) -> dict[str, Decimal]:
        """Return the published figures by the published names of their rows, digit for digit."""
        found: dict[str, Decimal] = {}
        for table in self.tables:
            text = files("layerfold").joinpath("published", f"{table}.csv").read_text(encoding="utf-8")
            for row in csv.DictReader(text.splitlines()):
                found[next(iter(row.values()))] = Decimal(row[self.column])
        return found


@dataclass(frozen=True)
class Differs:
    """How a published figure was measured, how ours is, and whether ``--protocol published`` repeats the former."""

    title: str
    published: str
    ours: str
    repeated: bool = False


@dataclass(frozen=True)
class PublishedStudy:
    """Published tables of one base.

    Attributes:
        name: in files.
        model, model_name: its base for people, and as the last part of the name that it is loaded by.
        base: the published name of the base's row.
        label: returns our label for a published name.
        metrics: what was published.
        differs: by evaluator.
        rows: notes on rows that are not what their name says: a title, how the names begin, and the note.
    """

    name: str
    model: str
    model_name: str
    base: str
    label: Callable[[str], str]
    metrics: Sequence[Metric]
    differs: Mapping[str, Differs]
    rows: Sequence[tuple[str, str, str]] = ()


_NAMED = {column.name: column for column in COLUMNS}
_PARAMETERS = (
    replace(_NAMED["parameters"], name="parameters_millions", unit=""),
    replace(_NAMED["nonzero_parameters"], name="nonzero_parameters_millions", unit="non-zero"),
)
_PERPLEXITY = (_NAMED["perplexity_before"], _NAMED["perplexity"])
_ACCURACY = Measure(
    "imdb_accuracy_percent", "", "", "share of test reviews that are classified rightly, with its 95% interval",
    Scored("imdb"), numerals.percent, "higher", interval=True,
)  # fmt: skip


def _rouge(key: str) -> Metric:
    meaning = f"F1 of {key.replace('rouge', 'ROUGE-')}, with its 95% interval over documents"
    ours = Measure(key, "", "", meaning, Scored("rouge", key), better="higher", interval=True)
    return Metric(key, key.replace("rouge", "ROUGE-"), ["rouge"], key, [ours])


GPT2 = PublishedStudy(
    name="gpt2",
    model="GPT-2",
    model_name="gpt2",
    base="gpt2",
    label=lambda name: BASE_LABEL if name == "gpt2" else name,
    metrics=(
        Metric("parameters_millions", "parameters", ["parameters"], "parameters_millions", _PARAMETERS, sign="M",
               convert=lambda count: count / 1e6),
        Metric("perplexity", "perplexity", ["perplexity"], "perplexity", _PERPLEXITY),
        Metric("latency_ms_per_sample", "latency", ["latency"], "milliseconds_per_sample", [_NAMED["latency_ms"]],
               "ms/sample"),
        Metric("speedup", "speed-up", ["latency"], "speedup_vs_gpt2", [_NAMED["speedup"]], TIMES_BASE),
        Metric("imdb_accuracy_percent", "IMDb accuracy", ["imdb_accuracy"], "accuracy_percent", [_ACCURACY], sign="%",
               convert=lambda fraction: 100 * fraction),
        *map(_rouge, ("rouge1", "rouge2", "rougeL")),
    ),
    differs={
        "size": Differs(
            "parameters",
            "Rounded counts; that of pruned_104M leaves out the weights that are zero.",
            "Ours: distinct parameters, a shared tensor counted once.",
        ),
        "perplexity": Differs(
            "perplexity",
            "The first 200 lines of WikiText-2's test text, cut at 128 tokens, after two epochs of training: both pad "
            "lines to one length and score the padding, so it is mostly padding whose prediction is measured (851.83 "
            "for gpt2 and 398,066 for compressed_4 before the training). Padding was left out for distilgpt2, scored "
            "on the validation text after one epoch.",
            "Ours: each token of the test text once, and no padding.",
            repeated=True,
        ),
        "latency": Differs(
            "latency",
            "20 generations of up to 64 tokens, each free to stop early, one model after another on a shared GPU.",
            "Ours: a fixed number of tokens, models timed in turn.",
            repeated=True,
        ),
        "imdb": Differs(
            "IMDb accuracy",
            "Reviews cut at 128 tokens; for pruned_104M, the last position is read, which is padding. The compressed "
            "models' spread is smaller than its uncertainty.",
            "Ours: the last real token is read, and every row is trained and cut alike.",
            repeated=True,
        ),
        "rouge": Differs(
            "ROUGE",
            "100 articles cut at 128 tokens, no cue, three beams; the prompt is part of the text scored, which makes "
            "it a score of the articles' own first lines.",
            "Ours: only new tokens, written after a cue.",
            repeated=True,
        ),
    },
    rows=(
        ("merged_n", "merged_", "Published: only the first FFN of each group became the average; the others were "
         "permuted, which changes nothing. Ours: all n FFNs are the average."),
        ("pruned_104M", "pruned_104M", "Published: half of the token embedding was zeroed, being tied to the one "
         "matrix that the pruning found. Ours: as the recipe says."),
    ),
)  # fmt: skip

_DROP_TABLES = ("layer_drop_sequential", "layer_drop_combinatorial")

DROP = PublishedStudy(
    name="distilgpt2_drop",
    model="DistilGPT-2",
    model_name="distilgpt2",
    base="none",
    label=lambda name: BASE_LABEL if name == "none" else f"drop_{name.replace(' ', ',')}",
    metrics=(
        Metric("parameters_millions", "parameters", _DROP_TABLES, "parameters_millions", _PARAMETERS, sign="M",
               convert=lambda count: count / 1e6),
        Metric("perplexity", "perplexity", _DROP_TABLES, "perplexity", _PERPLEXITY),
        Metric("latency_ms", "latency", _DROP_TABLES, "milliseconds", [_NAMED["latency_ms"]], "ms"),
    ),
    differs={
        "size": Differs(
            "parameters",
            "Distinct parameters, rounded.",
            "Ours: the same, a shared tensor counted once.",
        ),
        "perplexity": Differs(
            "perplexity",
            "WikiText-2's test text in windows of 1,024 tokens that advance by 512: a sound protocol.",
            "Ours: the same where the recipe sets that text, context and stride.",
        ),
        "latency": Differs(
            "latency",
            "What is timed is not said; models of the same depth are up to twice as fast as each other.",
            "Ours: a fixed number of tokens, models timed in turn.",
        ),
    },
)  # fmt: skip

STUDIES = (GPT2, DROP)
