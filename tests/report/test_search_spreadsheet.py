"""The files that hold all candidates of a search."""

from __future__ import annotations

import csv
import math
import sys

import pytest

from layerfold.errors import MissingExtraError, OutputError
from layerfold.report import write_search_csv, write_search_parquet

HEADER = (
    "removed,blocks,perplexity,kl,parameters,milliseconds,parameters_change_percent,perplexity_change_percent,speed_change_percent,best,"
    "test_perplexity,test_perplexity_low,test_perplexity_high,"
    "test_versus_base,test_versus_base_low,test_versus_base_high"
)


def csv_of(found, tmp_path):
    write_search_csv(found, tmp_path / "found.csv")
    return (tmp_path / "found.csv").read_text(encoding="utf-8")


def test_every_figure_is_there_unrounded(make_found, tmp_path):
    found = make_found({(1,): 160.25, (1, 3): 217.0, (2, 3): 434.0})
    assert csv_of(found, tmp_path).splitlines() == [
        HEADER,
        f"none,12,86.8,0.0,7367936,7.0,0.0,0.0,0.0,true,108.5,{0.96 * 108.5},{1.04 * 108.5},1.0,1.0,1.0",
        f"1,11,160.25,0.5,6962432,6.5,{100 * (6962432 / 7367936 - 1)},{100 * (160.25 / 86.8 - 1)},"
        f"{100 * (6.5 / 7 - 1)},true,"
        f"200.3125,{0.96 * 200.3125},{1.04 * 200.3125},"
        f"{200.3125 / 108.5},{0.98 * (200.3125 / 108.5)},{1.02 * (200.3125 / 108.5)}",
        f"1 3,10,217.0,1.0,6556928,6.0,{100 * (6556928 / 7367936 - 1)},150.0,{100 * (1 / (7 / 6) - 1)},true,"
        f"271.25,{0.96 * 271.25},{1.04 * 271.25},2.5,{0.98 * 2.5},{1.02 * 2.5}",
        f"2 3,10,434.0,1.0,6556928,6.0,{100 * (6556928 / 7367936 - 1)},400.0,{100 * (1 / (7 / 6) - 1)},false,,,,,,",
    ]


def test_what_is_not_measured_is_empty_and_what_is_not_finite_is_written(make_found, tmp_path):
    found = make_found({(0,): math.nan, (1,): math.inf, (2,): 1e5}, tests={}, timings={})
    rows = list(csv.DictReader(csv_of(found, tmp_path).splitlines()))
    assert [row["perplexity"] for row in rows] == ["86.8", "nan", "inf", "100000.0"]
    assert [row["perplexity_change_percent"] for row in rows][:3] == ["0.0", "nan", "inf"]
    for name in ("milliseconds", "speed_change_percent", *HEADER.split(",")[10:]):
        assert {row[name] for row in rows} == {""}
    assert [row["best"] for row in rows] == ["true", "false", "false", "true"]


def test_a_number_without_a_best_has_none(make_found, tmp_path):
    found = make_found({(0,): 90.0, (0, 1): 95.0}, best={})
    assert [row["best"] for row in csv.DictReader(csv_of(found, tmp_path).splitlines())] == ["true", "false", "false"]


def test_parquet_holds_the_same_table(make_found, make_sets, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    found = make_found(make_sets(2) | {(0,): math.nan, (1,): math.inf})
    rows = list(csv.DictReader(csv_of(found, tmp_path).splitlines()))
    write_search_parquet(found, tmp_path / "found.parquet")
    table = parquet.read_table(tmp_path / "found.parquet")
    assert ",".join(table.column_names) == HEADER
    types = {"removed": "string", "blocks": "int64", "parameters": "int64", "best": "bool"}
    assert {field.name: str(field.type) for field in table.schema} == {
        name: types.get(name, "double") for name in HEADER.split(",")
    }

    def written(value):
        return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

    assert [{name: written(value) for name, value in row.items()} for row in table.to_pylist()] == rows
    assert len(rows) == 1 + 12 + 66
    write_search_parquet(make_found(tests={}, timings={}), tmp_path / "found.parquet")
    assert parquet.read_table(tmp_path / "found.parquet")["milliseconds"].null_count == 13


def test_files_are_the_same_each_time(make_found, make_sets, tmp_path):
    pytest.importorskip("pyarrow")
    for name, write in (("a.csv", write_search_csv), ("a.parquet", write_search_parquet)):
        write(make_found(make_sets(2)), tmp_path / name)
        first = (tmp_path / name).read_bytes()
        write(make_found(make_sets(2)), tmp_path / name)
        assert (tmp_path / name).read_bytes() == first


def test_parquet_without_pyarrow_names_the_extra(make_found, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"'pyarrow' is not installed: pip install 'layerfold\[datasets\]'"):
        write_search_parquet(make_found(), tmp_path / "found.parquet")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [write_search_csv, write_search_parquet])
def test_a_folder_that_cannot_be_written(make_found, tmp_path, write):
    pytest.importorskip("pyarrow")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write(make_found(), tmp_path / "file" / "found")
