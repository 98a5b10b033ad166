"""Studies of tasks under odd conditions: broken models, one test text, labels that are markup."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from layerfold.records import Record, Results, read_results
from layerfold.report.published import compare

MARKUP = "<script>alert(1)</script> [red]x[/]"


@pytest.fixture
def recipe(model: Path, study_corpus: str, write: Any) -> Any:
    """Write a recipe with every task, one test text each and a label that is markup."""
    rows = "".join(f"{('good fine', 'bad poor')[i % 2]} film {i},{i % 2}\n" for i in range(80))
    data = write("rows.csv", "text,label\n" + rows)
    pairs = write("pairs/test.csv", "document,summary\n<b>The film</b>. It ran. So it is.,the film\n")
    evaluate = [
        "size",
        {"perplexity": {"corpus": study_corpus, "limit_tokens": 100}},
        {"generation": {"prompts": ["<i>a"], "new_tokens": 2}},
        {"imdb": {"data": str(data), "body": False, "train_rows": 20, "test_rows": 1}},
        {"rouge": {"data": str(pairs.parent), "new_tokens": 2}},
    ]

    def make(**more: Any) -> Path:
        document = {
            "base": str(model),
            "variants": [{"label": MARKUP, "merge": {"n": 2}}],
            "evaluate": evaluate,
            "calibration": {"corpus": study_corpus, "tokens": 200},
        }
        found: Path = write("recipe.yaml", json.dumps(document | more))
        return found

    return make


def test_one_test_text_and_a_label_of_markup(layerfold: Any, recipe: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = layerfold("study", recipe(), "--output-dir", run, "--json")
    assert done.code == 0, done.err

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    document = json.loads(done.out, parse_constant=refuse)
    labels = ["base", MARKUP, "bag of words", "lead-3", "random sentences"]
    assert [row["label"] for row in document["variants"]] == labels
    difference = document["variants"][1]["scores"]["imdb"]["versus_base"]
    assert -1 <= difference["low"] < difference["high"] <= 1
    assert document["variants"][3]["scores"]["rouge"]["rouge1"]["high"] is None
    for row in document["variants"][:3]:
        assert row["scores"]["imdb"]["largest_class"] == 1  # of one test text
    with (run / "results.csv").open() as file:
        rows = {row["label"]: row for row in csv.DictReader(file)}
    assert list(rows) == labels
    assert rows["lead-3"]["rouge1_high"] == "nan"
    assert float(rows["bag of words"]["imdb_accuracy"]) in (0, 1)
    assert [row["imdb_largest_class"] for row in rows.values()] == ["1.0", "1.0", "1.0", "", ""]
    assert "largest class" in done.err + layerfold("report", run).out
    assert rows["bag of words"]["perplexity"] == rows["lead-3"]["blocks"] == ""

    page = (run / "report.html").read_text()
    assert "<script" not in page
    assert "<i>a" not in page
    assert "1 compressed variant of" in page
    assert "largest class" in page
    shown = re.sub("<[^>]+>", " ", re.sub("<svg.*?</svg>|<style.*?</style>", "", page, flags=re.DOTALL))
    assert not re.search(r"\bnan\b", shown)
    assert "seeds" not in shown.partition("How it was measured")[0]
    printed = layerfold("report", run).out
    assert "<script>alert(1)</script>" in printed
    assert "[red]x[/]" in printed
    refused = layerfold("report", run, "--against", "published")
    assert refused.code == 2
    assert "lead-3" not in refused.err


def test_the_page_says_what_is_over_seeds_and_what_is_the_firsts(layerfold: Any, recipe: Any, tmp_path: Path) -> None:
    done = layerfold("study", recipe(seeds=[0, 1]), "--output-dir", tmp_path / "run")
    assert done.code == 0, done.err
    page = (tmp_path / "run" / "report.html").read_text()
    assert "above its standard deviation (±)" in page
    assert "Texts are those of the first seed." in page


def test_texts_are_generated_with_the_first_of_several_seeds_alone(layerfold: Any, recipe: Any, tmp_path: Path) -> None:
    words = ("generate", recipe(seeds=[3, 1]), "--prompt", "a", "--new-tokens", 2, "--output-dir", tmp_path / "run")
    done = layerfold(*words, "--json")
    assert done.code == 0, done.err
    assert len(list((tmp_path / "run" / "records").iterdir())) == 2
    assert read_results(tmp_path / "run" / "generate").recipe["seed"] == 3


def test_deviations_over_seeds_stand_beside_the_published_figures_in_files() -> None:
    score = {"value": 0.8, "low": 0.7, "high": 0.9, "unit": "accuracy", "deviation": 0.02}
    records = {
        (label, "imdb"): Record(label, label, "imdb", "classification-2", each, {}, {}, {}, 1.0)
        for label, each in (("base", score), ("merged_2", {**score, "deviation": None}))
    }
    (comparison,) = compare(Results("gpt2", {}, ("base", "merged_2"), ("imdb",), records))
    assert comparison.figures(0)["ours_imdb_accuracy_percent_deviation"] == pytest.approx(2)
    assert comparison.figures(1)["ours_imdb_accuracy_percent_deviation"] is None
