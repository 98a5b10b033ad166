"""The table in the terminal."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from layerfold.report import print_table, write_html
from layerfold.report.study import columns
from layerfold.report.tables import MISSING


def printed(results, width, **options):
    console = Console(width=width, file=io.StringIO(), **options)
    print_table(results, console)
    return console.file.getvalue()


def shown_cells(results):
    for column in columns(results):
        if not column.detail:
            for label in results.labels:
                cell = column.cell(results, label)
                yield from (text for text in (cell.value, cell.interval) if text)


@pytest.mark.parametrize("width", [40, 80, 100, 200])
def test_no_label_and_no_figure_is_cut(make_results, width):
    results = make_results()
    text = printed(results, width)
    words = text.split()
    assert max(map(len, text.splitlines())) <= width
    assert set(results.labels) <= set(words)
    assert set(shown_cells(results)) <= set(words)
    assert "…" not in text


def test_one_table_fits_in_100_columns(make_results):
    assert printed(make_results(), 100).count("variant") == 1


def test_a_table_with_pruned_rows_says_what_zeros_do_not_do(make_results):
    results = make_results()
    size = results.records["merged_2", "size"]
    pruned = replace(size, score=size.score | {"nonzero": 0.84 * size.score["value"]})
    caveat = "zeros alone make nothing faster on dense kernels"
    assert caveat not in printed(results, 200)
    assert caveat in printed(make_results(replace={("merged_2", "size"): pruned}), 200)


def test_columns_of_an_evaluator_stay_together(make_results):
    lines = printed(make_results(), 80).splitlines()
    headers = [line.split() for line in lines if "perplexity" in line or "speed-up" in line]
    assert headers == [
        ["blocks", "parameters", "removed", "perplexity", "perplexity"],
        ["latency", "speed-up", "repeated"],
    ]


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_recovery_shows_before_beside_after_and_what_it_took(make_recovered, width):
    results = make_recovered({"merged_2": None})
    text = printed(results, width)
    assert max(map(len, text.splitlines())) <= width
    assert set(shown_cells(results)) <= set(text.split())
    assert [line for line in text.splitlines() if re.search(r"before +after +\S+ base", line)]
    assert [line for line in text.splitlines() if re.search(r"tokens +seconds", line)]
    rows = [line.split() for line in text.splitlines() if line.startswith("merged_2 ")]
    assert sum(row.count(MISSING) for row in rows) == 3
    assert [row[-2:] for row in rows][-1] == [MISSING, MISSING]


def test_hostile_labels_are_plain_text(make_results):
    text = printed(make_results(rename={"merged_2": "[red]x[/red]\x1b[2J", "merged_4": "[/]"}), 100)
    assert "[red]x[/red]" in text
    assert "[/]" in text
    assert "\x1b" not in text


def test_long_labels_continue_on_the_next_line(make_results):
    label = "abcdefghij" * 9
    text = printed(make_results(rename={"merged_2": label}), 100)
    first_table = text.split("variant")[1]
    column = "".join(line[:33].strip() for line in first_table.splitlines())
    assert label in column
    assert set(shown_cells(make_results())) <= set(text.split())


def test_missing_and_not_finite_figures(make_results):
    full = make_results()
    collapsed = replace(
        full.records["merged_4", "perplexity"],
        score={"value": float("nan"), "low": float("nan"), "high": float("inf"), "unit": "perplexity"},
    )
    text = printed(make_results(replace={("merged_2", "latency"): None, ("merged_4", "perplexity"): collapsed}), 100)
    row = next(line for line in text.splitlines() if line.startswith("merged_2"))
    assert row.split()[-3:] == [MISSING, MISSING, "12%"]
    assert "nan" in next(line for line in text.splitlines() if line.startswith("merged_4"))


@pytest.mark.parametrize("evaluators", [(), ("size",), ("latency",)])
def test_a_study_of_few_evaluators(make_results, evaluators):
    text = printed(make_results(evaluators=evaluators, labels=("base",)), 100)
    assert "base" in text
    assert ("quartiles" in text) == ("latency" in evaluators)


def test_the_narrowest_consoles_do_not_fail(make_results):
    for width in (1, 5, 20):
        printed(make_results(), width)


@pytest.mark.parametrize(
    ("same", "said"),
    [
        ((1.002, 0.991, 1.012), "speed of a copy of the base: +0.2% [-0.9%, +1.2%]"),
        ((0.962, 0.951, 0.97), "warning: speed of a copy of the base: -3.8% [-4.9%, -3.0%]. Equal models should"),
    ],
)
def test_the_base_timed_twice_is_said_beside_the_speedups(make_results, tmp_path, same, said):
    results = make_results()
    timed = {
        (label, "latency"): replace(
            record, score=record.score | {"same_model": dict(zip(("value", "low", "high"), same, strict=True))}
        )
        for label in results.labels
        if (record := results.records.get((label, "latency"))) is not None
    }
    found = make_results(replace=timed)
    assert " ".join(printed(found, 200).split()).count(said) == 1
    write_html(found, page := tmp_path / "page.html")
    assert f"{said[0].upper()}{said[1:]}" in page.read_text(encoding="utf-8")
    assert "copy of the base" not in printed(results, 200)  # records of latency-1
