"""The page of a plan, and its CSV file."""

from __future__ import annotations

import csv
import html
import json
import re
from dataclasses import replace

import pytest
import yaml
from pages import HOSTILE, Page
from plans import saying, trial

from layerfold.errors import OutputError
from layerfold.report import write_plan_csv, write_plan_html
from layerfold.report.plan import front_table, trials_table, winner_table


def page_of(planned, tmp_path):
    write_plan_html(planned, tmp_path / "plan.html", planned.recipe(planned.model))
    return (tmp_path / "plan.html").read_text(encoding="utf-8")


def csv_of(planned, tmp_path):
    write_plan_csv(planned, tmp_path / "plan.csv")
    return list(csv.DictReader((tmp_path / "plan.csv").read_text(encoding="utf-8").splitlines()))


def test_all_tables_have_every_row(make_plan, tmp_path):
    planned = make_plan()
    text = page_of(planned, tmp_path)
    rows = Page(text).rows
    for table in (winner_table(planned), front_table(planned), trials_table(planned)):
        for label, cells in table.rows:
            assert [[label], *([text for text in (cell.value, cell.interval) if text] for cell in cells)] in rows
    order = ['id="winner-about"', 'id="front-about"', "<summary>All trials", 'id="trials-about"', "<svg"]
    assert [text.index(each) for each in order] == sorted(text.index(each) for each in order)
    assert text.count("<svg") == 1
    assert "merge n=3, tied.</p>" in text


def test_summary(make_plan, tmp_path):
    lead = re.search(r'<p class="lead">(.*?)</p>', page_of(make_plan(), tmp_path))[1]
    assert html.unescape(lead) == (
        "Asked for: at most 4,594,106 parameters. Found, of 15 trials: drop 5,6 + prune 25% of neurons, repaired on "
        "all text. It has 34.0% fewer parameters than pocket, and perplexity on the test text is 1.25 times the "
        "base's, at 1.38 times its speed. The budget is met with 4,593,795."
    )
    untimed = page_of(make_plan("perplexity", 1.1, timed=False), tmp_path)
    assert "1.25 times the base&#39;s. The budget is not met, with 1.250 on the test text (95% interval" in untimed


def test_texts_settings_environment_and_recipe_are_listed(make_plan, tmp_path):
    planned = make_plan()
    text = page_of(planned, tmp_path)
    cards = dict(re.findall(r"<h3>(.*?)</h3>(.*?)</article>", text, re.DOTALL))
    assert list(cards) == ["Selection text", "Test text", "Trials", "Settings"]
    assert "Only the base and what was planned are measured on it." in cards["Test text"]
    assert "65,536" in cards["Selection text"]
    assert "66%" in cards["Settings"]
    assert "2.13.0" in text
    recipe = re.search(r"<pre>(.*?)</pre>", text, re.DOTALL)[1]
    assert yaml.safe_load(html.unescape(recipe)) == json.loads(json.dumps(planned.recipe("pocket")))


def test_a_plan_of_one_trial_that_was_not_timed(make_plan, tmp_path):
    tried = trial("prune", 4593795, 244.5, repaired=False)
    planned = make_plan(trials=[replace(tried, whole=True)], timed=False)
    text = page_of(planned, tmp_path)
    assert text.count("<svg") == 1
    assert "Found, of 2 trials: prune 50% of neurons." in text
    assert [row["standing"] for row in csv_of(planned, tmp_path)] == ["front", "planned"]


def test_all_text_is_escaped(make_plan, tmp_path):
    hostile = {HOSTILE: HOSTILE}
    plain = make_plan()
    first = saying(plain.trials[1], HOSTILE, HOSTILE)
    endless = saying(plain.trials[2], HOSTILE, perplexity=float("inf"))
    planned = replace(
        plain,
        model=f"{HOSTILE}\x1b\ud800</title></style>{{{{ 7 * 7 }}}}",
        trials=(plain.base, first, endless, *plain.trials[3:]),
        settings=plain.settings | hostile | {"corpus": HOSTILE},
        **dict.fromkeys(("text", "test_text", "environment"), hostile),
    )
    text = page_of(planned, tmp_path)
    page = Page(text)
    assert not {"script", "img"} & {tag for tag, _ in page.elements}
    assert not [attributes for _, attributes in page.elements if {"style", "src", "onerror"} & set(attributes)]
    # The title, the heading, the summary, the model and the corpus among the settings; four listings of two; two rows
    # of all trials and one of the front; the plot's note; the recipe's base and corpora.
    assert "".join(page.text).replace('\\"', '"').count(HOSTILE) == 5 + 8 + 3 + 1 + 3
    assert "{{ 7 * 7 }}" in text


def test_page_loads_nothing_and_its_ids_are_its_own(make_plan, tmp_path):
    text = page_of(make_plan(), tmp_path)
    assert not re.search(r"https?:|//[a-z]|@import", text)
    ids = [attributes["id"] for _, attributes in Page(text).elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_same_findings_give_the_same_bytes(make_plan, tmp_path):
    assert page_of(make_plan(), tmp_path) == page_of(make_plan(), tmp_path)
    assert csv_of(make_plan(), tmp_path) == csv_of(make_plan(), tmp_path)


def test_every_trial_is_a_row_of_the_file_unrounded(make_plan, tmp_path):
    planned = make_plan()
    rows = csv_of(planned, tmp_path)
    assert len(rows) == len(planned.trials)
    assert list(rows[0]) == [
        *("said", "family", "repair", "whole", "standing", "blocks", "neurons", "heads", "parameters"),
        *("perplexity", "parameters_change_percent", "perplexity_change_percent"),
        *(
            f"{name}{end}"
            for name in ("test_perplexity", "test_versus_base", "milliseconds", "speedup")
            for end in ("", "_low", "_high")
        ),
    ]
    (winner,) = (row for row in rows if row["standing"] == "planned")
    assert list(winner.values()) == [
        *("drop 5,6 + prune 25% of neurons, repaired", "drop + prune", "refit+attention", "true", "planned"),
        *("6", "2296", "36", "4593795", "108.5", str(100 * (4593795 / 6960768 - 1)), "25.0"),
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


@pytest.mark.parametrize("write", [write_plan_html, write_plan_csv])
def test_a_folder_that_cannot_be_written(make_plan, tmp_path, write):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write(make_plan(), tmp_path / "file" / "plan", *[{"base": "pocket"}] * (write is write_plan_html))
