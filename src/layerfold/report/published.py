"""A study beside the published figures: every metric in two columns, ours and theirs, never in one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

from layerfold.errors import InputError
from layerfold.files import Json
from layerfold.maths.intervals import Interval
from layerfold.records import BASE_LABEL, RECOVERY, Results
from layerfold.report.columns import Measure, shows_zeros
from layerfold.report.published_tables import STUDIES, Metric, PublishedStudy
from layerfold.report.report import (
    Cell,
    Column,
    Figure,
    Line,
    Listing,
    Part,
    Report,
    Section,
    Table,
    certain,
    figures,
)

PUBLISHED = "published"
"""What `--against` takes, and what says in a header whose the column is."""

_STANDS_FOR = {"distilgpt2": "distilled"}
"""The label of ours that a published row stands beside where none has its name."""

_SAME_CODE = "Ours: by the published protocol too; the code path is the same."
_OTHER_CODE = "Ours: by the protocol of the published GPT-2 tables, which these were not measured by."


@dataclass(frozen=True)
class Row:
    """A row of the comparison: our label and the published name, at least one of them."""

    label: str | None
    name: str | None
    shown: str


@dataclass(frozen=True)
class Side:
    """One column of a metric, ours or theirs, with its cells and, for files, each row's figures by header."""

    column: Column
    cells: Sequence[Cell]
    figures: Sequence[Mapping[str, Figure]]


@dataclass(frozen=True)
class Comparison:
    """A study beside one published study.

    Attributes:
        name: of the published study, in files.
        model: its base.
        caveat: says that our base is another; else empty.
        table: a column for each of `sides`.
        rows, sides: of the table, with unrounded figures.
        notes: how the figures of each metric differ, with its title.
    """

    name: str
    model: str
    caveat: str
    table: Table
    rows: Sequence[Row]
    sides: Sequence[Side]
    notes: Sequence[tuple[str, str]]

    def figures(self, index: int) -> dict[str, Figure]:
        """Return a row's figures by name, ours and theirs, as files hold them."""
        return {name: figure for side in self.sides for name, figure in side.figures[index].items()}

    def to_json(self) -> dict[str, Json]:
        """Return one document, ours and theirs apart."""
        return {
            "name": self.name,
            "model": self.model,
            "caveat": self.caveat,
            "notes": dict(self.notes),
            "rows": [
                {"label": row.label, "published_label": row.name}
                | {
                    name: float(figure) if isinstance(figure, Decimal) else figure
                    for name, figure in self.figures(index).items()
                }
                for index, row in enumerate(self.rows)
            ],
        }


def compare(results: Results) -> tuple[Comparison, ...]:
    """Return the published studies that share a row and a metric with these results, beside them.

    Our base stands beside the published one, and is a shared row only if both are the same model.

    Raises:
        InputError: no published study does.
    """
    found = [comparison for study in STUDIES if (comparison := _compare(results, study)) is not None]
    if not found:
        variants = [label for label in results.labels if label not in (BASE_LABEL, *results.baselines)]
        raise InputError(
            "this run has no figure of a row beside the base that the published tables have; rows: "
            f"{', '.join(variants[:20]) or 'none'}; measured: {', '.join(results.evaluators) or 'nothing'}; published "
            "rows: distilgpt2, pruned_104M, merged_N, compressed_N, drop_N"
        )
    return tuple(found)


def published_report(comparisons: Sequence[Comparison]) -> Report:
    """Return comparisons as a report for the terminal and the CSV file; the page has them in the study's report.

    The file has one row a variant: figures unrounded in columns of ours and of theirs, empty where there is none.
    """
    printed: list[Line | Table] = []
    rows: list[dict[str, Figure]] = []
    for comparison in comparisons:
        caveat = [Line(comparison.caveat, "")] if comparison.caveat else []
        notes = [Line(note, title=title) for title, note in comparison.notes]
        heading = Line(f"Beside the published figures of {comparison.model}", "heading")
        printed += [heading, *caveat, Line(""), comparison.table, *notes, Line("")]
        rows += [
            {"published_study": comparison.name, "label": row.label, "published_label": row.name}
            | comparison.figures(index)
            for index, row in enumerate(comparison.rows)
        ]
    return Report(PUBLISHED, "", "", printed, rows, [])


def published_sections(comparisons: Sequence[Comparison], seeds: str) -> Iterator[Section]:
    """Return a section of the page for each comparison; `seeds` says what figures are over several seeds."""
    caption = "Ours and the published in columns of their own; a figure of ours stands above its interval."
    for comparison in comparisons:
        caveat = [Line(comparison.caveat, "warning")] if comparison.caveat else []
        table = replace(comparison.table, caption=f"{caption}{seeds}")
        parts: list[Part] = [*caveat, table, Listing(comparison.notes)]
        yield Section(table.name, f"Beside the published figures of {comparison.model}", parts)


def _compare(results: Results, study: PublishedStudy) -> Comparison | None:
    rows = _rows(results, study)
    same = _same_model(results, study)
    known = [(metric, metric.figures()) for metric in study.metrics]
    shared = {
        metric.name: [
            row for row in rows if row.name in figures and row.label is not None and _ours(results, metric, row)
        ]
        for metric, figures in known
    }
    if not any(same or row.label != BASE_LABEL for sharing in shared.values() for row in sharing):
        return None
    known = [(metric, figures) for metric, figures in known if shared[metric.name]]
    rows = [row for row in rows if any(row.name in figures or _ours(results, metric, row) for metric, figures in known)]
    sides = [side for metric, figures in known for side in _sides(results, metric, figures, rows)]
    caveat = (
        f"Published figures are of {study.model}, ours of {results.base}: different models stand side by side, and "
        "only their pattern can be compared."
    )
    cells = [(row.shown, [side.cells[index] for side in sides]) for index, row in enumerate(rows)]
    base = next((row.shown for row in rows if row.label == BASE_LABEL), "")
    return Comparison(
        name=study.name,
        model=study.model,
        caveat="" if same else caveat,
        table=Table("ours / published", base, [side.column for side in sides], cells, f"published-{study.name}"),
        rows=rows,
        sides=sides,
        notes=_notes(results, study, [metric for metric, _ in known], rows),
    )


def _rows(results: Results, study: PublishedStudy) -> list[Row]:
    """Return our rows in their order, then those that only the published study has."""
    names = dict.fromkeys(name for metric in study.metrics for name in metric.figures())
    beside = {_label(results, study, name): name for name in names}
    ours = [Row(label, beside.get(label), _shown(label, beside.get(label), study)) for label in results.labels]
    return ours + [Row(None, name, label) for label, name in beside.items() if label not in results.labels]


def _shown(label: str, name: str | None, study: PublishedStudy) -> str:
    """Return our label of a row, with the published name if that differs."""
    if label == BASE_LABEL:
        return f"{label} / {study.model_name}"
    return label if name is None or study.label(name) == label else f"{label} / {name}"


def _label(results: Results, study: PublishedStudy, name: str) -> str:
    label = study.label(name)
    other = _STANDS_FOR.get(label)
    return other if other in results.labels and label not in results.labels else label


def _columns(results: Results, metric: Metric) -> list[Measure]:
    """Return our columns of a metric; that of non-zero parameters only if a row has many zeros."""
    return [column for column in metric.ours if column.key != "nonzero" or shows_zeros(results)]


def _ours(results: Results, metric: Metric, row: Row) -> bool:
    """Whether the row has a figure of ours."""
    return row.label is not None and any(column.read(results, row.label) for column in _columns(results, metric))


def _sides(results: Results, metric: Metric, published: Mapping[str, Decimal], rows: Sequence[Row]) -> Iterator[Side]:
    for column in _columns(results, metric):
        found = [None if row.label is None else column.read(results, row.label) for row in rows]
        if any(found):
            ours = Column(
                f"ours_{column.name}",
                metric.title,
                ", ".join(filter(None, ("ours", _unit(results, column)))),
                f"ours: {column.meaning}",
                lambda _, each: each,
                column.show,
                column.better,
                column.interval,
                metric.name,
            )
            seeds = any(each and each.deviation is not None for each in found)
            kept = [figures([ours], results, _converted(each, metric), seeds) for each in found]
            yield Side(ours, [ours.cell(results, each) for each in found], kept)
    theirs = [None if row.name is None else published.get(row.name) for row in rows]
    other = Column(
        f"{PUBLISHED}_{metric.name}",
        metric.title,
        ", ".join(filter(None, (PUBLISHED, metric.unit))),
        "as published, digit for digit",
        lambda _, each: None if each is None else certain(each),
        lambda value: f"{value:,}{metric.sign}",
        metric.ours[-1].better,
        group=metric.name,
    )
    yield Side(other, [other.cell(results, each) for each in theirs], [{other.name: each} for each in theirs])


def _converted(found: Interval | None, metric: Metric) -> Interval | None:
    """Return a figure of ours in the published unit, for files."""
    if found is None:
        return None
    deviation = None if found.deviation is None else metric.convert(found.deviation)
    return replace(found.map(metric.convert), deviation=deviation)


def _unit(results: Results, column: Measure) -> str:
    if column.evaluator == "perplexity" and RECOVERY in results.evaluators:
        return "after"
    if column.name == "latency_ms":  # the published protocol's is another
        scores = (results.score(label, column.evaluator) for label in results.labels)
        return str(next((score["unit"] for score in scores if score), column.unit))
    return column.unit


def _same_model(results: Results, study: PublishedStudy) -> bool:
    """Whether our base has the published base's name and, if it was measured, its size."""
    same = Path(results.base).name.lower() == study.model_name
    size = results.score(BASE_LABEL, "size")
    if not same or size is None:
        return same
    published = next(metric.figures()[study.base] for metric in study.metrics if metric.evaluator == "size")
    digits = len(str(published).partition(".")[2])
    return bool(round(size["value"] / 1e6, digits) == float(published))


def _notes(
    results: Results, study: PublishedStudy, metrics: Sequence[Metric], rows: Sequence[Row]
) -> list[tuple[str, str]]:
    notes = []
    for evaluator in dict.fromkeys(metric.evaluator for metric in metrics):
        differs = study.differs[evaluator]
        scores = [results.score(label, evaluator) or {} for label in results.labels]
        ours = differs.ours
        if any(score.get("protocol") == PUBLISHED for score in scores):
            ours = _SAME_CODE if differs.repeated else _OTHER_CODE
        texts = dict.fromkeys(str(score[key]) for score in scores for key in ("corpus", "data") if score.get(key))
        told = f" Our text: {', '.join(texts)}." if texts else ""
        notes.append((differs.title, f"{differs.published} {ours}{told}"))
    names = [row.name for row in rows if row.name is not None]
    return notes + [(title, note) for title, begin, note in study.rows if any(name.startswith(begin) for name in names)]
