"""The CSV file of a search for a window to share."""

from __future__ import annotations

import csv
import math

import pytest

from layerfold.errors import OutputError
from layerfold.report import write_windows_csv

HEADER = (
    "window,start,k,perplexity,kl,parameters,parameters_change_percent,perplexity_change_percent,best,"
    "test_perplexity,test_perplexity_low,test_perplexity_high,"
    "test_versus_base,test_versus_base_low,test_versus_base_high"
)


def csv_of(found, tmp_path):
    write_windows_csv(found, tmp_path / "found.csv")
    return (tmp_path / "found.csv").read_text(encoding="utf-8")


def test_every_figure_is_there_unrounded(make_windows, tmp_path):
    assert csv_of(make_windows({(0, 2): 173.6, (3, 2): 217.0}), tmp_path).splitlines() == [
        HEADER,
        f"none,,,86.8,0.0,6960768,0.0,0.0,true,108.5,{0.96 * 108.5},{1.04 * 108.5},1.0,1.0,1.0",
        f"0:2,0,2,173.6,0.25,6696576,{100 * (6696576 / 6960768 - 1)},100.0,true,"
        f"217.0,{0.96 * 217.0},{1.04 * 217.0},2.0,1.96,2.04",
        f"3:2,3,2,217.0,0.25,6696576,{100 * (6696576 / 6960768 - 1)},150.0,false,,,,,,",
    ]


def test_what_is_not_measured_is_empty_and_what_is_not_finite_is_written(make_windows, tmp_path):
    found = make_windows({(0, 2): math.nan, (1, 2): math.inf}, tests={})
    rows = list(csv.DictReader(csv_of(found, tmp_path).splitlines()))
    assert [row["perplexity"] for row in rows] == ["86.8", "nan", "inf"]
    assert [row["best"] for row in rows] == ["true", "false", "false"]
    for name in HEADER.split(",")[9:]:
        assert {row[name] for row in rows} == {""}


def test_files_are_the_same_each_time(make_windows, tmp_path):
    assert csv_of(make_windows(), tmp_path) == csv_of(make_windows(), tmp_path)


def test_a_folder_that_cannot_be_written(make_windows, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write_windows_csv(make_windows(), tmp_path / "file" / "found.csv")
