"""The CSV file."""

from __future__ import annotations

import csv
import math
from dataclasses import replace

import pytest

from layerfold.errors import OutputError
from layerfold.report import write_csv


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return {row["label"]: row for row in csv.DictReader(file)}


def test_parses_back_to_the_exact_numbers(make_results, tmp_path):
    results = make_results()
    write_csv(results, tmp_path / "results.csv")
    rows = rows_of(tmp_path / "results.csv")
    assert tuple(rows) == results.labels
    for label, row in rows.items():
        perplexity, latency = results.score(label, "perplexity"), results.score(label, "latency")
        size, generation = results.score(label, "size"), results.score(label, "generation")
        for name, score in (
            ("perplexity", perplexity),
            ("perplexity_ratio", perplexity.get("versus_base")),
            ("latency_ms", latency),
            ("speedup", latency.get("speedup")),
            ("prefill_ms", latency["prefill"]),
            ("repeated_4grams", generation),
        ):
            for column, key in ((name, "value"), (f"{name}_low", "low"), (f"{name}_high", "high")):
                assert row[column] == ("" if score is None else repr(score[key]))
        for name, key in (
            ("blocks", "blocks"),
            ("parameters", "parameters"),
            ("nonzero_parameters", "nonzero"),
            ("dense_bytes", "bytes"),
            ("compact_bytes", "compact_bytes"),
            ("flops_per_token", "flops_per_token"),
        ):
            assert int(row[name]) == size[key]
        assert float(row["bits_per_byte"]) == perplexity["bits_per_byte"]
        assert float(row["removed_fraction"]) == 1 - size["parameters"] / results.score("base", "size")["parameters"]


def test_recovery_is_written_unrounded(make_recovered, tmp_path):
    results = make_recovered({"merged_2": None, "merged_4": {"before": None, "seconds": math.nan}})
    write_csv(results, tmp_path / "results.csv")
    rows = rows_of(tmp_path / "results.csv")
    score = results.score("compressed_4", "recovery")
    expected = {
        "perplexity_before": score["before"]["value"],
        "perplexity_before_low": score["before"]["low"],
        "perplexity_before_high": score["before"]["high"],
        "perplexity": results.score("compressed_4", "perplexity")["value"],
        "recovery_tokens": 100352,
        "recovery_seconds": 61.25,
        "recovery_validation_perplexity": score["value"],
        "recovery_parameters": 4290123,
        "recovery_learning_rate": 0.001,
        "recovery_search_tokens": 75264,
        "recovery_best_step": 49,
    }
    assert {name: rows["compressed_4"][name] for name in expected} == {k: repr(v) for k, v in expected.items()}
    assert {value for name, value in rows["merged_2"].items() if name.startswith("recovery_")} == {""}
    assert (rows["merged_2"]["perplexity_before"], rows["merged_4"]["perplexity_before_high"]) == ("", "")
    assert rows["merged_4"]["recovery_seconds"] == "nan"


def test_recovery_adds_columns_and_renames_none(make_results, make_recovered, tmp_path):
    headers = []
    for name, results in (("with", make_recovered()), ("without", make_results())):
        write_csv(results, tmp_path / f"{name}.csv")
        headers.append((tmp_path / f"{name}.csv").read_text(encoding="utf-8").splitlines()[0].split(","))
    assert [name for name in headers[0] if "recovery" not in name and "before" not in name] == headers[1]
    assert len(headers[0]) == len(set(headers[0]))


def test_missing_is_empty_and_not_finite_is_written(make_results, tmp_path):
    record = make_results().records["merged_4", "perplexity"]
    broken = replace(record, score=record.score | {"value": math.nan, "low": 1.5, "high": math.inf})
    results = make_results(replace={("merged_2", "size"): None, ("merged_4", "perplexity"): broken})
    write_csv(results, tmp_path / "results.csv")
    rows = rows_of(tmp_path / "results.csv")
    assert (rows["merged_2"]["blocks"], rows["merged_2"]["removed_fraction"]) == ("", "")
    row = rows["merged_4"]
    assert math.isnan(float(row["perplexity"]))
    assert (float(row["perplexity_low"]), float(row["perplexity_high"])) == (1.5, math.inf)


def test_labels_survive(make_results, tmp_path):
    hostile = '=cmd|"/c calc"!A1, and\na line'
    write_csv(make_results(rename={"merged_2": hostile}), tmp_path / "results.csv")
    rows = rows_of(tmp_path / "results.csv")
    assert hostile in rows
    assert rows[hostile]["blocks"] == "12"


def test_unknown_evaluators_are_written(make_results, make_record, tmp_path):
    score = {"value": 0.1, "low": 0.05, "high": 0.15}
    results = make_results(evaluators=("mood",), replace={("base", "mood"): make_record("base", "mood", score)})
    write_csv(results, tmp_path / "results.csv")
    assert (tmp_path / "results.csv").read_text().splitlines()[:2] == [
        "label,mood,mood_low,mood_high",
        "base,0.1,0.05,0.15",
    ]


def test_a_folder_that_cannot_be_written(make_results, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write_csv(make_results(), tmp_path / "file" / "results.csv")
