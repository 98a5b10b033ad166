"""The report of a plan: its page, its tables and what became of its budget in the terminal, and its CSV file."""

from __future__ import annotations

import html
import json
import math
import re
from dataclasses import replace

import pytest
import yaml
from made import make_plan
from pages import HOSTILE, cards_of, csv_of, headers, page_of, printed
from plans import TRIALS, saying, trial

from layerfold.maths.intervals import Interval
from layerfold.report.plan import front_table, outcome, standing, trials_table, winner_table
from layerfold.report.report import DASH, MISSING, Cell

BOTH = "drop 5,6 + prune 25% of neurons, repaired"
ON_TEST = "on the test text (95% interval"
BEYOND, WITHIN = "which reaches beyond the budget", "which reaches within it"


def test_what_was_built_stands_first_then_the_front_then_all_trials():
    planned = make_plan()
    text = page_of(planned)
    order = ['id="winner-about"', 'id="front-about"', ">All trials</summary>", 'id="trials-about"', "<svg"]
    assert [text.index(each) for each in order] == sorted(text.index(each) for each in order)
    assert text.count("<svg") == 1
    assert "merge n=3, tied.</p>" in text


def test_summary():
    lead = re.search(r'<p class="lead">(.*?)</p>', page_of(make_plan()))[1]
    assert html.unescape(lead) == (
        "Asked for: at most 4,594,106 parameters. Found, of 15 trials: drop 5,6 + prune 25% of neurons, repaired on "
        "all text. It has 34.0% fewer parameters than pocket, and perplexity on the test text is 1.25 times the "
        "base's, at 1.38 times its speed. The budget is met with 4,593,795."
    )
    untimed = page_of(make_plan("perplexity", 1.1, timed=False))
    assert "1.25 times the base&#39;s. The budget is not met, with 1.250 on the test text (95% interval" in untimed


def test_texts_settings_environment_and_recipe_are_listed():
    planned = make_plan()
    text = page_of(planned)
    cards = cards_of(text)
    assert list(cards) == ["Selection text", "Test text", "Trials", "Settings"]
    assert "Only the base and what was planned are measured on it." in cards["Test text"]
    assert "65,536" in cards["Selection text"]
    assert "66%" in cards["Settings"]
    assert "2.13.0" in text
    recipe = re.search(r"<pre>(.*?)</pre>", text, re.DOTALL)[1]
    assert yaml.safe_load(html.unescape(recipe)) == json.loads(json.dumps(planned.recipe("pocket")))


def test_every_trial_is_a_row_of_the_file_unrounded():
    planned = make_plan()
    rows = csv_of(planned)[1]
    assert len(rows) == len(planned.trials)
    assert list(rows[0]) == [
        *("said", "family", "repair", "whole", "standing", "blocks", "neurons", "heads", "parameters"),
        *("dense_bytes", "compact_bytes", "perplexity", "parameters_change_percent", "perplexity_change_percent"),
        *(
            f"{name}{end}"
            for name in ("test_perplexity", "test_versus_base", "milliseconds", "speedup")
            for end in ("", "_low", "_high")
        ),
    ]
    (winner,) = (row for row in rows if row["standing"] == "planned")
    assert list(winner.values()) == [
        *("drop 5,6 + prune 25% of neurons, repaired", "drop + prune", "refit+attention", "true", "planned"),
        *("6", "2296", "36", "4593795", "13921536", "9187590", "108.5", str(100 * (4593795 / 6960768 - 1)), "25.0"),
        *(str(1.25 * 86.8 * factor) for factor in (1.25, 1.21, 1.29)),
        *("1.25", "1.21", "1.29", "4.75", "4.5", "5.0", "1.375", "1.34", "1.41"),
    ]
    assert [rows[0][name] for name in ("said", "standing", "test_versus_base", "speedup")] == [
        "as it is",
        "front",
        "1.0",
        "",
    ]
    assert [row["perplexity"] for row in rows if row["said"] == "merge n=3, tied"] == ["inf"]
    assert {row["test_perplexity"] for row in rows[1:] if row is not winner} == {""}


def rows(table):
    return [(label, [cell.value for cell in cells]) for label, cells in table.rows]


def test_the_front_stands_below_the_base_the_largest_first():
    table = front_table(make_plan())
    assert (table.header, table.base) == ("what was done", "as it is")
    assert "; ".join(headers(table)) == (
        "blocks; neurons; heads; parameters; removed of the base; dense MB; compact MB; perplexity; perplexity × base"
    )
    assert rows(table) == [
        ("as it is", ["12", "3,480", "72", "6.96M", "0.0%", "13.9", "13.9", "86.80", "1.00"]),
        (BOTH, ["9", "2,888", "54", "5.78M", "17.0%", "13.9", "11.6", "90.25", "1.04"]),
        (BOTH, ["6", "2,296", "36", "4.59M", "34.0%", "13.9", "9.19", "112.5", "1.30"]),
        ("drop 3,5,6,7, repaired", ["6", "2,271", "36", "4.54M", "34.7%", "13.9", "9.09", "118.2", "1.36"]),
        ("merge n=3, tied, repaired", ["4", "1,952", "24", "3.90M", "43.9%", "13.9", "7.81", "240.0", "2.76"]),
    ]
    better = trial("drop", 6555264, 80.0)
    labels = [label for label, _ in front_table(make_plan(trials=(*TRIALS, better))).rows]
    assert labels[:2] == ["as it is", "drop 3,5,6,7, repaired"], "the base heads it also where something smaller is"
    assert BOTH not in labels[:2]


def test_all_trials_and_what_became_of_them():
    table = trials_table(make_plan())
    found = [(label, cells[0], cells[4]) for label, cells in rows(table)]
    assert headers(table)[0] == "standing"
    assert found == [
        ("as it is", "front", "6.96M"),
        (BOTH, "front", "5.78M"),
        (f"{BOTH} on all text", "planned", "4.59M"),
        (BOTH, "front", "4.59M"),
        ("prune 50% of neurons, repaired", "", "4.59M"),
        ("prune 50% of neurons", "", "4.59M"),
        ("share 1:9, repaired", "", "4.55M"),
        ("share 1:9", "", "4.55M"),
        ("drop 3,5,6,7, repaired on all text", "finalist", "4.54M"),
        ("drop 3,5,6,7, repaired", "front", "4.54M"),
        ("drop 3,5,6,7", "", "4.54M"),
        ("collapse n=2, repaired", "", "4.19M"),
        ("collapse n=2", "", "4.19M"),
        ("merge n=3, tied, repaired", "front", "3.90M"),
        ("merge n=3, tied", "", "3.90M"),
    ]
    assert rows(table)[-1][1][-2:] == ["inf", "inf"]


def test_a_plan_of_one_trial_that_was_not_repaired_and_not_timed():
    tried = trial("prune", 4593795, 244.5, repaired=False)
    untimed = make_plan(trials=[replace(tried, whole=True)], timed=False)
    text = page_of(untimed)
    assert text.count("<svg") == 1
    assert "Found, of 2 trials: prune 50% of neurons." in text
    assert [row["standing"] for row in csv_of(untimed)[1]] == ["front", "planned"]
    planned = make_plan(trials=[tried, replace(tried, whole=True)], timed=False)
    assert [(label, cells[0]) for label, cells in rows(trials_table(planned))] == [
        ("as it is", "front"),
        ("prune 50% of neurons", "planned"),
    ]
    assert [standing(planned, each) for each in planned.trials] == ["front", "planned", "planned"]
    assert [label for label, _ in front_table(planned).rows] == ["as it is", "prune 50% of neurons"]
    assert "budget: at most 4,594,106 parameters: met with 4,593,795\n" in printed(planned)


def test_what_was_planned_has_its_intervals():
    table = winner_table(make_plan())
    assert headers(table) == [
        *("parameters", "removed of the base", "dense MB", "compact MB", "blocks"),
        *("perplexity test", "perplexity test, × base"),
        *("latency ms/token", "speed-up × base"),
    ]
    assert [label for label, _ in table.rows] == ["as it is", f"{BOTH} on all text"]
    assert dict(table.rows)["as it is"][5:] == [
        *(Cell("108.5", f"104.2{DASH}112.8"), Cell("1.00", "")),
        *(Cell(MISSING, ""), Cell(MISSING, "")),
    ]
    assert dict(table.rows)[f"{BOTH} on all text"] == [
        *(Cell("4.59M", ""), Cell("34.0%", ""), Cell("13.9", ""), Cell("9.19", ""), Cell("6", "")),
        *(Cell("135.6", f"131.3{DASH}140.0"), Cell("1.25", f"1.21{DASH}1.29")),
        *(Cell("4.75", f"4.50{DASH}5.00"), Cell("1.38", f"1.34{DASH}1.41")),
    ]


def test_without_latency_there_is_none_in_the_table_and_no_speed_is_met():
    planned = make_plan(timed=False)
    assert headers(winner_table(planned))[-1] == "perplexity test, × base"
    assert "ms/token" not in printed(planned)
    assert "quartiles below ms/token" in printed(make_plan())
    assert outcome(make_plan("speedup", 1.5, timed=False)) == "not met: nothing was timed"


@pytest.mark.parametrize(
    ("kind", "value", "figure", "said"),
    [
        ("parameters", 4594106, None, "at most 4,594,106 parameters: met with 4,593,795"),
        ("parameters", 4593795, None, "at most 4,593,795 parameters: met with 4,593,795"),
        ("parameters", 4593794, None, "at most 4,593,794 parameters: not met, with 4,593,795"),
        ("perplexity", 1.3, (1.25, 1.21, 1.29), "met with 1.250 on the test text (95% interval 1.210–1.290)"),
        ("perplexity", 1.1, (1.082, 1.051, 1.123), f"met with 1.082 {ON_TEST} 1.051–1.123, {BEYOND})"),
        ("perplexity", 1.1, (1.122, 1.101, 1.143), f"not met, with 1.122 {ON_TEST} 1.101–1.143)"),
        ("perplexity", 1.1, (1.104, 1.071, 1.143), f"not met, with 1.104 {ON_TEST} 1.071–1.143, {WITHIN})"),
        ("perplexity", 1.1, (1.05, math.nan, math.nan), "met with 1.050 on the test text"),
        ("speedup", 1.5, (1.55, 1.51, 1.59), "met with 1.550 (95% interval 1.510–1.590)"),
        ("speedup", 1.5, (1.52, 1.48, 1.56), f"met with 1.520 (95% interval 1.480–1.560, {BEYOND})"),
        ("speedup", 1.5, (1.45, 1.41, 1.49), "not met, with 1.450 (95% interval 1.410–1.490)"),
        ("speedup", 1.5, (1.49, 1.46, 1.52), f"not met, with 1.490 (95% interval 1.460–1.520, {WITHIN})"),
    ],
)
def test_the_budget_is_met_or_not(kind, value, figure, said):
    asked = {"parameters": "", "perplexity": f"perplexity at most {value} times the base's: "}
    begin = asked.get(kind, f"at least {value} times as fast: ")
    interval = figure and Interval(*figure)
    assert f"budget: {begin}{said}\n" in printed(make_plan(kind, value, versus_base=interval, speedup=interval))


def test_the_tables_then_the_budget_then_the_texts():
    text = printed(make_plan(), 200)
    order = ["merge n=3, tied, repaired", "on all text", "95% intervals below", "budget: at most", "chosen on"]
    assert [text.index(each) for each in order] == sorted(text.index(each) for each in order)
    assert text.endswith(
        "chosen on movie-reviews validation, 65,536 tokens; tested on movie-reviews test, 131,072 tokens\n"
    )


def test_hostile_text_is_plain_text():
    hostile = saying(TRIALS[0], f"{HOSTILE}\x1b[2J")
    text = printed(make_plan(trials=(*TRIALS[1:], hostile), text={"corpus": "[red]x[/red]\x1b"}), 400)
    assert "\x1b" not in text
    assert HOSTILE in text
    assert "[red]x[/red]" in text
