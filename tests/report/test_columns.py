"""What the columns read from records, and how they write it."""

from __future__ import annotations

import math
import re

import pytest

from layerfold.maths.intervals import Interval
from layerfold.report import numerals
from layerfold.report.columns import COLUMNS, columns
from layerfold.report.report import DASH, TIMES_BASE, Cell
from layerfold.report.study import table


def column(results, name):
    return next(each for each in columns(results) if each.name == name)


def test_figures_are_those_of_the_records(make_results):
    results = make_results()
    score = results.score("merged_4", "perplexity")
    versus = score["versus_base"]
    assert column(results, "perplexity").read(results, "merged_4") == Interval(
        score["value"], score["low"], score["high"]
    )
    assert column(results, "perplexity_ratio").read(results, "merged_4") == Interval(
        versus["value"], versus["low"], versus["high"]
    )
    assert column(results, "blocks").read(results, "compressed_4") == Interval(3, 3, 3)
    removed = column(results, "removed_fraction").read(results, "compressed_10")
    assert removed.value == 1 - 2501888 / 6961920
    assert column(results, "removed_fraction").read(results, "base").value == 0


def test_base_has_no_figure_over_itself(make_results):
    results = make_results()
    assert column(results, "perplexity_ratio").read(results, "base") is None
    assert column(results, "speedup").cell(results, "base") == Cell(DASH, "")


def test_cells_show_value_and_interval(make_results):
    results = make_results()
    assert column(results, "parameters").cell(results, "base") == Cell("6.96M", "")
    assert column(results, "removed_fraction").cell(results, "compressed_10") == Cell("64.1%", "")
    assert column(results, "perplexity").cell(results, "base") == Cell("81.24", f"78.15{DASH}84.57")
    assert column(results, "repeated_4grams").cell(results, "merged_2") == Cell("12%", f"9.6{DASH}14%")
    assert column(results, "dense_bytes").cell(results, "base") == Cell("27.8 MB", "")


def test_only_evaluators_of_the_study_have_columns(make_results):
    assert {each.evaluator for each in columns(make_results(evaluators=("size",)))} == {"size"}
    assert columns(make_results(evaluators=())) == ()


def test_the_largest_class_stands_beside_the_accuracy_where_the_record_has_it(make_results, make_record):
    score = {"value": 0.8, "low": 0.7, "high": 0.9, "unit": "accuracy", "lower_is_better": False}
    for more, names in (
        ({}, ["imdb_accuracy", "imdb_difference"]),
        ({"largest_class": 0.55}, ["imdb_accuracy", "imdb_largest_class", "imdb_difference"]),
    ):
        results = make_results(
            evaluators=("imdb",), replace={("base", "imdb"): make_record("base", "imdb", {**score, **more})}
        )
        assert [each.name for each in columns(results)] == names
        if more:
            assert column(results, "imdb_largest_class").cell(results, "base") == Cell("55.0%", "")


def test_unknown_evaluator_has_a_column_of_its_own(make_results, make_record):
    score = {"value": 0.8372, "low": 0.8301, "high": 0.8441, "unit": "accuracy", "lower_is_better": False}
    results = make_results(
        evaluators=("mood", "size"),
        replace={("merged_2", "mood"): make_record("merged_2", "mood", score)},
    )
    mood = columns(results)[-1]
    assert (mood.name, mood.title, mood.unit, mood.better) == (
        "mood",
        "mood",
        "accuracy",
        "higher",
    )
    assert mood.cell(results, "merged_2") == Cell("0.837", f"0.830{DASH}0.844")
    assert mood.cell(results, "base") == Cell(DASH, "")


def test_the_published_protocol_is_named_in_the_header(make_results):
    results = make_results(scores={("base", "perplexity"): {"protocol": "published"}})
    assert column(results, "perplexity").unit == "published"
    assert column(make_results(), "perplexity").unit == ""


def test_recovery_shows_perplexity_before_and_after_it(make_recovered):
    results = make_recovered()
    shown = columns(results)
    titled = [(each.title, each.unit) for each in shown if each.title == "perplexity"]
    assert titled == [("perplexity", "before"), ("perplexity", "after"), ("perplexity", TIMES_BASE)]
    names = [each.name for each in shown]
    assert names.index("perplexity_before") + 1 == names.index("perplexity")
    before = results.score("merged_4", "recovery")["before"]
    assert column(results, "perplexity_before").read(results, "merged_4") == Interval(**before)
    assert (
        column(results, "perplexity").read(results, "merged_4").value
        == results.score("merged_4", "perplexity")["value"]
    )


def test_recovery_tells_what_it_took(make_recovered):
    results = make_recovered()
    shown = {each.name: (each.cell(results, "merged_4"), each.detail) for each in columns(results)}
    assert shown["recovery_tokens"] == (Cell("100k", ""), False)
    assert shown["recovery_seconds"] == (Cell("61.2", ""), False)
    assert shown["recovery_search_tokens"] == (Cell("75.3k", ""), True)
    assert shown["recovery_learning_rate"] == (Cell("0.001", ""), True)
    assert shown["recovery_best_step"] == (Cell("49", ""), True)
    assert shown["recovery_parameters"] == (Cell("4.29M", ""), True)
    validation = results.score("merged_4", "recovery")["value"]
    assert column(results, "recovery_validation_perplexity").read(results, "merged_4").value == validation


def test_without_recovery_nothing_tells_of_it(make_results):
    shown = columns(make_results())
    assert not [each for each in shown if "recovery" in f"{each.name} {each.evaluator} {each.title} {each.meaning}"]
    assert [each.unit for each in shown if each.title == "perplexity"] == ["", TIMES_BASE]


def test_what_was_before_recovery_needs_perplexity(make_recovered):
    names = [each.name for each in columns(make_recovered(evaluators=("size", "recovery")))]
    assert "perplexity_before" not in names
    assert "recovery_tokens" in names
    results = make_recovered(
        {"merged_2": None, "merged_4": {"before": None}, "merged_6": {"before": {"value": math.nan}}}
    )
    before = column(results, "perplexity_before")
    assert [before.cell(results, f"merged_{n}") for n in (2, 4, 6)] == [Cell(DASH, ""), Cell(DASH, ""), Cell("nan", "")]


def test_the_published_protocol_is_named_before_and_after_recovery(make_recovered):
    results = make_recovered(scores={("base", "perplexity"): {"protocol": "published"}})
    assert column(results, "perplexity_before").unit == "before, published"
    assert column(results, "perplexity").unit == "after, published"


def test_names_are_headers_of_a_table_for_programs():
    names = [each.name for each in COLUMNS]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) for name in names)


def test_unknown_evaluator_may_report_a_value_alone(make_results, make_record):
    results = make_results(
        evaluators=("score",), replace={("base", "score"): make_record("base", "score", {"value": -3.5})}
    )
    assert columns(results)[0].cell(results, "base") == Cell("-3.50", "")


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ((math.nan, math.nan, math.nan), Cell("nan", "")),
        ((math.inf, math.inf, math.inf), Cell("inf", "")),
        ((math.inf, 1e300, math.inf), Cell("inf", f"1.00e300{DASH}inf")),
        ((2.0, math.nan, math.nan), Cell("2.000", "")),
        ((398066.0, 380120.0, 412331.0), Cell("3.98e5", f"3.80e5{DASH}4.12e5")),
        ((-1.0, -2.0, 0.5), Cell("-1.000", "-2.000 to 0.5000")),
        ((None, None, None), Cell(DASH, "")),
    ],
)
def test_any_value_can_be_shown(make_results, bounds, expected):
    results = make_results(scores={("base", "perplexity"): dict(zip(("value", "low", "high"), bounds, strict=True))})
    assert column(results, "perplexity").cell(results, "base") == expected


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0, 0.0, -0.5, 1e-9, 99.96, 999999, 1e300, 7])
def test_every_writer_takes_every_number(value):
    for each in COLUMNS:
        assert each.show(value)


@pytest.mark.parametrize(
    ("write", "value", "expected"),
    [
        (numerals.significant, 99.96, "100"),
        (numerals.significant, 9012.4, "9,012"),
        (numerals.precise, 29.414, "29.41"),
        (numerals.significant, 0.00001234, "1.23e-5"),
        (numerals.count, 81_912_576, "81.9M"),
        (numerals.count, 1.5e9, "1.50B"),
        (numerals.count, 12, "12"),
        (numerals.memory, 12, "12 B"),
        (numerals.plain, 0.001, "0.001"),
        (numerals.plain, 3e-5, "3e-5"),
        (numerals.plain, 2e10, "2e10"),
        (numerals.plain, math.nan, "nan"),
        (numerals.times, 0.998, "1.00"),
        (numerals.times, 0.0123, "0.0123"),
        (numerals.rough_percent, 0.0341, "3.4%"),
        (numerals.rough_percent, 0.0996, "10%"),
        (numerals.printable, "a\x1b[31m\nb\ud800", "a�[31m�b�"),
    ],
)
def test_numbers_as_people_read_them(write, value, expected):
    assert write(value) == expected


def test_non_zero_parameters_are_shown_where_a_row_has_many_zeros(make_results):
    # Of 6,566,016; biases that are zero are few.
    for nonzero, told in ((6566016, False), (5515453, True), (6559450, False)):
        results = make_results(scores={("merged_2", "size"): {"nonzero": nonzero}})
        assert ("nonzero_parameters" in [column.name for column in table(results).columns]) == told


OUT = ("multiplied_out_ms", "multiplied_out_speedup")


def test_latency_multiplied_out_is_shown_where_a_row_has_it(make_results):
    plain = make_results()
    assert not {each.name for each in columns(plain)} & set(OUT)
    both = {
        name: {"value": value, "low": value - 0.5, "high": value + 0.5}
        for name, value in (("multiplied_out", 9.25), ("multiplied_out_speedup", 1.5))
    }
    results = make_results(scores={("merged_2", "latency"): both})
    names = [each.name for each in table(results).columns]
    assert names[names.index("speedup") + 1 :][:2] == list(OUT)
    time, speedup = (column(results, name) for name in OUT)
    assert time.cell(results, "merged_2") == Cell("9.25", f"8.75{DASH}9.75")
    assert speedup.cell(results, "merged_2") == Cell("1.50", f"1.00{DASH}2.00")
    for label in ("base", "merged_4"):
        assert [each.cell(results, label) for each in (time, speedup)] == [Cell(DASH, "")] * 2
    assert (time.unit, speedup.unit, time.better, speedup.better) == ("ms/token", TIMES_BASE, "lower", "higher")


def test_a_base_with_deltas_has_the_time_and_the_speedup_over_itself(make_results):
    figures = {"multiplied_out": {"value": 9.25, "low": 9.0, "high": 9.5}, "multiplied_out_speedup": None}
    results = make_results(scores={("base", "latency"): figures})
    assert OUT[0] in [each.name for each in columns(results)]
    assert OUT[1] not in [each.name for each in columns(results)], "no row has it"


def test_latency_multiplied_out_is_not_shown_without_latency(make_results):
    assert not {each.name for each in columns(make_results(evaluators=("size", "perplexity")))} & set(OUT)
