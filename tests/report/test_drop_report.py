"""The report of a search for blocks to drop: its page, its tables in the terminal, and its CSV file."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
from made import make_found, make_sets
from pages import Page, cards_of, csv_of, headers, lead_of, listed, page_of, printed, rows, section

from layerfold.report import numerals
from layerfold.report.report import DASH, MISSING, Cell
from layerfold.report.search import best_table, candidate_table
from layerfold.report.search_columns import condensed, described, removed

HEADER = (
    "removed,blocks,perplexity,kl,parameters,milliseconds,parameters_change_percent,perplexity_change_percent,speed_change_percent,best,"
    "test_perplexity,test_perplexity_low,test_perplexity_high,"
    "test_versus_base,test_versus_base_low,test_versus_base_high"
)
MARKUP = "[red]<script>[/red]\x1b[2J"


def test_the_best_stand_before_the_candidates_and_the_drawings():
    found = make_found(make_sets(2))
    text = page_of(found)
    assert text.index('id="best-about"') < text.index(">Candidates</summary>") < text.index('id="candidates-about"')
    assert text.index('id="candidates-about"') < text.index("<svg")
    assert text.count("<svg") == 2
    assert text.count('<tr class="base">') == 2
    assert "in the CSV file" not in text


def test_4096_candidates_are_cut_to_a_page():
    text = page_of(make_found(make_sets(12), eliminated=77))
    assert len(text) < 1_000_000
    assert "3,583 more candidates in the CSV file." in text
    assert len(Page(text).rows) == 2 + 13 + 513
    assert "77 more candidates given up in the race, before all of the text was read." in text


def test_summary():
    assert lead_of(page_of(make_found(make_sets(3)))) == (
        "298 sets of pocket's 12 blocks measured: without block 5, perplexity on the test text is 1.05 times the "
        "base's, at 1.08 times its speed; without blocks 4 6 9, perplexity on the test text is 1.21 times the base's, "
        "at 1.27 times its speed."
    )
    bare = make_found({(0,): 868.0}, blocks=1, tests={}, timings={}, settings={"part": "ffn"})
    assert lead_of(page_of(bare)) == (
        "1 set of pocket's 1 FFN measured: without FFN 0, perplexity on the selection text is 10.0 times the base's."
    )
    assert lead_of(page_of(make_found({}))) == "0 sets of pocket's 12 blocks measured."


def test_texts_settings_work_and_environment_are_listed():
    text = page_of(make_found())
    cards = cards_of(section(text, "protocols"))
    assert list(cards) == ["Selection text", "Test text", "Latency", "Settings", "Work"]
    assert listed(cards["Selection text"]) == {
        "corpus": "movie-reviews",
        "split": "validation",
        "tokens": "65,536",
        "tokens sha256": "0f" * 32,
    }
    assert listed(cards["Test text"])["tokens"] == "131,072"
    assert "took no part in choosing" in cards["Test text"]
    assert "measured once for each number" in cards["Latency"]
    assert listed(cards["Settings"]) == {
        "part": "block",
        "remove": "1",
        "objective": "perplexity",
        "seed": "\N{EN DASH}",
        "model": "pocket",
        "model sha256": "5e" * 32,
    }
    assert listed(cards["Work"]) == {
        "scored windows": "786,432",
        "windows of all candidates": "9,437,184",
    }
    assert listed(section(text, "environment")) == {"versions": "torch 2.13.0", "threads": "2"}


def test_what_was_not_measured_is_not_spoken_of():
    text = page_of(make_found({(0, 1): 99.0}, timings={}, tests={}, work={}))
    assert "<h3>Latency" not in text
    assert "<h3>Work" not in text
    assert "given up" not in text
    assert '<abbr title="not measured">\N{EN DASH}</abbr>' in text
    assert "No candidate removes one block alone." in text
    assert text.count("<svg") == 1


def test_the_lines_below_say_what_was_read_and_what_was_given_up():
    text = printed(make_found(eliminated=1))
    assert "1 more candidate given up in the race, before all of the text was read\n" in text
    assert "chosen on movie-reviews validation, 65,536 tokens; tested on movie-reviews test, 131,072 tokens\n" in text
    assert "race" not in printed(make_found())


def test_repaired_candidates_are_said_to_be_and_how_far():
    said = "candidates are listed with each block repaired by itself, the best of each number with a whole repair"
    found = make_found()
    best = {number: replace(each, perplexity=0.9 * each.perplexity, kl=math.nan) for number, each in found.best.items()}
    repaired = replace(found, best=best, settings=found.settings | {"objective": "repaired"})
    assert said not in page_of(found) + printed(found, 200)
    page = page_of(repaired)
    assert page.count(f"{said}.") == 1
    assert "nan" not in re.sub(r"<svg.*?</svg>|<style.*?</style>|<script.*?</script>", "", page, flags=re.DOTALL)
    assert said in printed(repaired, 200)
    assert f"{said}; 1 more candidate given up" in printed(replace(repaired, eliminated=1), 200)
    assert rows(candidate_table(repaired, 9)) == rows(candidate_table(found, 9))


def test_figures_that_are_not_finite():
    found = make_found({(0,): math.nan, (1,): math.inf, (2,): 1e5})
    text = page_of(found)
    assert "Not drawn, being out of the scale&#39;s range: 0, 1." in text
    nothing = replace(found, base=replace(found.base, perplexity=math.nan), candidates=found.candidates[:2], best={})
    assert page_of(nothing).count("Nothing to draw") == 2


def lines(text, start):
    return [line.split() for line in text.splitlines() if line.startswith(start)]


def test_candidates_have_the_published_columns():
    table = candidate_table(make_found(), 500)
    assert (table.header, table.base) == ("removed", "none")
    assert "; ".join(headers(table)) == (
        "blocks left; perplexity; latency ms/token; parameters; perplexity change; latency change; KL nats"
    )
    assert rows(table)["none"] == ["12", "86.80", "7.00", "7.37M", "+0.0%", "+0.0%", "0"]
    assert rows(table)["0"] == ["11", "8,080", "6.50", "6.96M", "+9,209%", "-7.1%", "0.500"]
    assert {cell.interval for _, cells in table.rows for cell in cells} == {""}


def test_the_best_have_their_intervals():
    table = best_table(make_found({(5,): 91.25, (6,): 91.5, (1, 3): 170.0, (4, 6): 99.0}))
    assert [label for label, _ in table.rows] == ["none", "5", "4 6"]
    assert "; ".join(headers(table)) == (
        "blocks left; perplexity selection; perplexity test; perplexity test, × base; latency ms/token; "
        "speed-up × base; parameters"
    )
    expected = {
        "none": (
            ("12", "86.80", "108.5", "1.00", "7.00", "1.00", "7.37M"),
            ("", "", f"104.2{DASH}112.8", "", f"6.93{DASH}7.14", "", ""),
        ),
        "4 6": (
            ("10", "99.00", "123.8", "1.14", "6.00", "1.17", "6.56M"),
            ("", "", f"118.8{DASH}128.7", f"1.12{DASH}1.16", f"5.94{DASH}6.12", f"1.14{DASH}1.19", ""),
        ),
    }
    for label, cells in expected.items():
        assert dict(table.rows)[label] == [Cell(*each) for each in zip(*cells, strict=True)]
    found = make_found()
    assert best_table(replace(found, best={0: found.base, **found.best})).rows == best_table(found).rows


def test_one_block_each_stand_in_their_order_and_many_by_perplexity_with_the_rest_counted():
    found = make_found({(index,): 100.0 - index for index in range(48)}, blocks=48)
    assert [row[0] for row in lines(printed(found), tuple("0123456789"))][:48] == [str(index) for index in range(48)]
    assert "more candidates" not in printed(found)
    found = make_found(make_sets(3))
    labels = [label for label, _ in candidate_table(found, 20).rows]
    ordered = sorted(found.candidates[12:], key=lambda each: each.perplexity)
    assert labels == ["none", *map(str, range(12)), *map(removed, ordered[:20])]
    text = printed(found)
    assert "271 more candidates in the CSV file\n" in text
    assert lines(text, "4 6 9 ") == [["4", "6", "9", "9", "105.4", "131.8", "1.21", "5.50", "1.27", "6.15M"]]


def test_the_objective_decides_and_nan_comes_last():
    found = make_found({(0,): math.nan, (1,): math.inf, (0, 1): 90.0, (0, 2): 95.0})
    assert [label for label, _ in candidate_table(found, 9).rows] == ["none", "0", "1", "0 1", "0 2"]
    pairs = make_found({(0, 1): math.nan, (0, 2): math.inf, (1, 2): 90.0, (1, 3): 95.0})
    assert [label for label, _ in candidate_table(pairs, 3).rows] == ["none", "1 2", "1 3", "0 2"]
    by_kl = replace(pairs, settings={"objective": "kl"})
    assert [label for label, _ in candidate_table(by_kl, 9).rows] == ["none", "0 1", "0 2", "1 2", "1 3"]
    assert rows(candidate_table(found, 9))["0"][:5] == ["11", "nan", "6.50", "6.96M", "nan"]
    assert rows(candidate_table(found, 9))["1"][4] == "inf"


def test_what_is_not_measured_is_a_dash():
    found = make_found(tests={}, timings={})
    assert rows(candidate_table(found, 9))["3"] == ["11", "93.12", MISSING, "6.96M", "+7.3%", MISSING, "0.500"]
    assert rows(best_table(found))["5"] == ["11", "91.25", MISSING, MISSING, MISSING, MISSING, "6.96M"]
    text = printed(found)
    assert "interval" not in text
    assert "quartile" not in text
    assert "tested on –" in printed(replace(found, text={}, test_text={}))


@pytest.mark.parametrize(("part", "words"), [("attention", "attention layers left"), ("ffn", "FFNs left")])
def test_sublayers_are_counted_though_all_blocks_are_left(part, words):
    found = make_found({(3,): 90.0, (3, 4): 95.0}, settings={"part": part})
    found = replace(found, candidates=tuple(replace(each, blocks=12) for each in found.candidates))
    assert headers(candidate_table(found, 9))[0] == words
    assert rows(candidate_table(found, 9))["3 4"][0] == "10"


def test_no_candidates_and_one_block():
    assert lines(printed(make_found({})), "none")[0] == ["none", "12", "86.80", "7.00", "7.37M", "+0.0%", "+0.0%", "0"]
    found = make_found({(0,): 1e5}, blocks=1)
    assert rows(candidate_table(found, 9))["0"] == ["0", "1.00e5", "1.00", "2.50M", "+1.15e5%", "-33.3%", "0.500"]


def test_hostile_text_is_plain_text():
    text = printed(make_found(text={"corpus": MARKUP, "split": "test"}, test_text={"corpus": [MARKUP]}), 200)
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
def test_what_is_removed(indices, shown, short):
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


def test_every_figure_is_there_unrounded():
    found = make_found({(1,): 160.25, (1, 3): 217.0, (2, 3): 434.0})
    assert csv_of(found)[0] == [
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


def test_what_is_not_measured_is_empty_and_what_is_not_finite_is_written():
    found = make_found({(0,): math.nan, (1,): math.inf, (2,): 1e5}, tests={}, timings={})
    _, rows = csv_of(found)
    assert [row["perplexity"] for row in rows] == ["86.8", "nan", "inf", "100000.0"]
    assert [row["perplexity_change_percent"] for row in rows][:3] == ["0.0", "nan", "inf"]
    for name in ("milliseconds", "speed_change_percent", *HEADER.split(",")[10:]):
        assert {row[name] for row in rows} == {""}
    assert [row["best"] for row in rows] == ["true", "false", "false", "true"]
    without = make_found({(0,): 90.0, (0, 1): 95.0}, best={})
    assert [row["best"] for row in csv_of(without)[1]] == ["true", "false", "false"]
