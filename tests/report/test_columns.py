"""What the columns read from records, and how they write it."""

from __future__ import annotations

import math
import re

import pytest
from made import make_record, make_recovered, make_results

from layerfold.maths.intervals import Interval
from layerfold.report import numerals
from layerfold.report.columns import COLUMNS, columns
from layerfold.report.report import DASH, TIMES_BASE, Cell
from layerfold.report.study import table


def column(results, name):
    return next(each for each in columns(results) if each.name == name)


def test_figures_are_those_of_the_records():
    results = make_results()
    score = results.score("merged_4", "perplexity")
    for name, read in (("perplexity", score), ("perplexity_ratio", score["versus_base"])):
        expected = Interval(read["value"], read["low"], read["high"])
        assert column(results, name).read(results, "merged_4") == expected
    assert column(results, "blocks").read(results, "compressed_4") == Interval(3, 3, 3)
    removed = column(results, "removed_fraction").read(results, "compressed_10")
    assert removed.value == 1 - 2501888 / 6961920
    assert column(results, "removed_fraction").read(results, "base").value == 0
    assert column(results, "perplexity_ratio").read(results, "base") is None, "over itself there is none"


@pytest.mark.parametrize(
    ("name", "label", "cell"),
    [
        ("parameters", "base", Cell("6.96M", "")),
        ("removed_fraction", "compressed_10", Cell("64.1%", "")),
        ("perplexity", "base", Cell("81.24", f"78.15{DASH}84.57")),
        ("repeated_4grams", "merged_2", Cell("12%", f"9.6{DASH}14%")),
        ("dense_bytes", "base", Cell("27.8 MB", "")),
        ("speedup", "base", Cell(DASH, "")),
    ],
)
def test_cells_show_value_and_interval(name, label, cell):
    assert column(make_results(), name).cell(make_results(), label) == cell


def test_only_evaluators_of_the_study_have_columns():
    assert {each.evaluator for each in columns(make_results(evaluators=("size",)))} == {"size"}
    assert columns(make_results(evaluators=())) == ()


def test_the_largest_class_stands_beside_the_accuracy_where_the_record_has_it():
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


def test_unknown_evaluator_has_a_column_of_its_own():
    score = {"value": 0.8372, "low": 0.8301, "high": 0.8441, "unit": "accuracy", "lower_is_better": False}
    records = {
        ("merged_2", "mood"): make_record("merged_2", "mood", score),
        ("base", "score"): make_record("base", "score", {"value": -3.5}),
    }
    results = make_results(evaluators=("score", "mood", "size"), replace=records)
    *_, alone, mood = columns(results)
    assert (mood.name, mood.title, mood.unit, mood.better) == ("mood", "mood", "accuracy", "higher")
    assert mood.cell(results, "merged_2") == Cell("0.837", f"0.830{DASH}0.844")
    assert mood.cell(results, "base") == Cell(DASH, "")
    assert alone.cell(results, "base") == Cell("-3.50", "")


def test_the_published_protocol_is_named_in_the_header():
    published = {("base", "perplexity"): {"protocol": "published"}}
    assert column(make_results(), "perplexity").unit == ""
    assert column(make_results(scores=published), "perplexity").unit == "published"
    recovered = make_recovered(scores=published)
    assert column(recovered, "perplexity_before").unit == "before, published"
    assert column(recovered, "perplexity").unit == "after, published"


def test_recovery_shows_perplexity_before_and_after_it_and_what_it_took():
    results = make_recovered()
    titled = [(each.title, each.unit) for each in columns(results) if each.title == "perplexity"]
    assert titled == [("perplexity", "before"), ("perplexity", "after"), ("perplexity", TIMES_BASE)]
    names = [each.name for each in columns(results)]
    assert names.index("perplexity_before") + 1 == names.index("perplexity")
    score = results.score("merged_4", "recovery")
    assert column(results, "perplexity_before").read(results, "merged_4") == Interval(**score["before"])
    after = column(results, "perplexity").read(results, "merged_4")
    assert after.value == results.score("merged_4", "perplexity")["value"]
    assert column(results, "recovery_validation_perplexity").read(results, "merged_4").value == score["value"]
    for name, shown, detail in (
        ("tokens", "100k", False),
        ("seconds", "61.2", False),
        ("search_tokens", "75.3k", True),
        ("learning_rate", "0.001", True),
        ("best_step", "49", True),
        ("parameters", "4.29M", True),
    ):
        found = column(results, f"recovery_{name}")
        assert (found.cell(results, "merged_4"), found.detail) == (Cell(shown, ""), detail)
    without = columns(make_results())
    assert not [each for each in without if "recovery" in f"{each.name} {each.evaluator} {each.title} {each.meaning}"]
    assert [each.unit for each in without if each.title == "perplexity"] == ["", TIMES_BASE]


def test_what_was_before_recovery_needs_perplexity():
    names = [each.name for each in columns(make_recovered(evaluators=("size", "recovery")))]
    assert "perplexity_before" not in names
    assert "recovery_tokens" in names
    results = make_recovered(
        {"merged_2": None, "merged_4": {"before": None}, "merged_6": {"before": {"value": math.nan}}}
    )
    before = column(results, "perplexity_before")
    assert [before.cell(results, f"merged_{n}") for n in (2, 4, 6)] == [Cell(DASH, ""), Cell(DASH, ""), Cell("nan", "")]


def test_names_are_headers_of_a_table_for_programs():
    names = [each.name for each in COLUMNS]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) for name in names)


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
def test_any_value_can_be_shown(bounds, expected):
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


def test_non_zero_parameters_are_shown_where_a_row_has_many_zeros():
    # Of 6,566,016; biases that are zero are few.
    for nonzero, told in ((6566016, False), (5515453, True), (6559450, False)):
        results = make_results(scores={("merged_2", "size"): {"nonzero": nonzero}})
        assert ("nonzero_parameters" in [column.name for column in table(results).columns]) == told


OPTIONAL = pytest.mark.parametrize("kind", ["multiplied_out", "captured"])


@OPTIONAL
def test_another_latency_is_shown_where_a_row_has_it(kind):
    plain, out = make_results(), (f"{kind}_ms", f"{kind}_speedup")
    assert not {each.name for each in columns(plain)} & set(out)
    both = {
        name: {"value": value, "low": value - 0.5, "high": value + 0.5}
        for name, value in ((kind, 9.25), (f"{kind}_speedup", 1.5))
    }
    results = make_results(scores={("merged_2", "latency"): both})
    names = [each.name for each in table(results).columns]
    assert names[names.index("speedup") + 1 :][:2] == list(out)
    time, speedup = (column(results, name) for name in out)
    assert time.cell(results, "merged_2") == Cell("9.25", f"8.75{DASH}9.75")
    assert speedup.cell(results, "merged_2") == Cell("1.50", f"1.00{DASH}2.00")
    for label in ("base", "merged_4"):
        assert [each.cell(results, label) for each in (time, speedup)] == [Cell(DASH, "")] * 2
    assert (time.unit, speedup.unit, time.better, speedup.better) == ("ms/token", TIMES_BASE, "lower", "higher")


@OPTIONAL
def test_a_base_has_the_time_and_no_speedup_and_without_latency_there_is_neither(kind):
    out = (f"{kind}_ms", f"{kind}_speedup")
    figures = {kind: {"value": 9.25, "low": 9.0, "high": 9.5}, f"{kind}_speedup": None}
    names = [each.name for each in columns(make_results(scores={("base", "latency"): figures}))]
    assert [each in names for each in out] == [True, False], "no row has a speed-up"
    assert not {each.name for each in columns(make_results(evaluators=("size", "perplexity")))} & set(out)
