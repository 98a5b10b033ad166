"""Studies with several seeds: means, deviations, and nothing measured twice."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layerfold.checkpoint.load import load
from layerfold.errors import RecipeError
from layerfold.maths.intervals import mean_interval
from layerfold.records import Record, Results, read_results, write_results
from layerfold.report import study_report, write_csv
from layerfold.report.study import table
from layerfold.study.recipe import read_recipe
from layerfold.study.replicates import combined
from layerfold.study.study import Study


def record(label: str, key: str, score: dict[str, Any], evaluator: str = "imdb") -> Record:
    return Record(key, label, evaluator, f"{evaluator}-1", score, {"seed": key}, {}, {}, 1.5)


def results(**records: Record) -> Results:
    rows = {(each.label, each.evaluator): each for each in records.values()}
    return Results("m", {"seed": 0}, tuple(dict.fromkeys(label for label, _ in rows)), ("imdb",), rows)


def accuracy(value: float, **more: Any) -> dict[str, Any]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "unit": "accuracy", **more}


def over_seeds(scores: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The score of a row that has one of these with each seed."""
    runs = {seed: results(a=record("a", str(seed), score)) for seed, score in enumerate(scores)}
    return combined({}, runs).records["a", "imdb"].score


def test_what_depends_on_no_seed_stays_and_what_only_some_measured_is_left_out() -> None:
    same = record("base", "key", accuracy(0.8))
    found = combined({}, {0: results(a=same), 1: results(a=same)})
    assert found.records["base", "imdb"] == same
    assert "deviation" not in found.records["base", "imdb"].score
    first = results(a=record("base", "1", accuracy(0.5)), b=record("other", "2", accuracy(0.5)))
    second = results(a=record("base", "3", accuracy(0.6)))
    assert list(combined({}, {0: first, 1: second}).records) == [("base", "imdb")]


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.5])
def test_the_interval_over_seeds_covers_what_it_says(spread: float) -> None:
    """Seeds share the documents, so that more of them say no more of those."""
    rng = np.random.default_rng(0)
    held = []
    for _ in range(600):
        documents = rng.normal(4, 0.3, 40)
        seeds = [mean_interval(documents + rng.normal(0, spread) + rng.normal(0, 0.1, 40)) for _ in range(3)]
        score = over_seeds(each.to_json() for each in seeds)
        held.append(score["low"] <= 4 <= score["high"])
    assert 0.935 <= np.mean(held) <= 0.999


def test_quartiles_and_parts_of_a_score_are_averaged_alike_and_none_stays_none() -> None:
    times = over_seeds({"value": v, "low": v - 1, "high": v + 1, "interval": "quartiles"} for v in (4.0, 6.0))
    assert (times["low"], times["value"], times["high"]) == (4.0, 5.0, 6.0)
    same = {"versus_base": None, "flag": True}
    score = over_seeds(
        [
            accuracy(0.1, rouge1={"value": 1.0, "low": 0.0, "high": 2.0}, empty=2, right=[1], **same),
            accuracy(0.3, rouge1={"value": 2.0, "low": 1.0, "high": 3.0}, empty=3, right=[0], **same),
        ]
    )
    assert score["rouge1"]["value"] == 1.5
    assert score["rouge1"]["deviation"] == pytest.approx(statistics.stdev([1, 2]))
    assert score["versus_base"] is None
    assert (score["empty"], score["flag"], score["right"]) == (2.5, True, [1])


def test_a_figure_is_the_mean_with_its_sample_deviation() -> None:
    values = [0.5, 0.7, 0.9]
    found = combined(
        {"seeds": [3, 1, 2]},
        {seed: results(a=record("base", str(seed), accuracy(v))) for seed, v in zip([3, 1, 2], values, strict=True)},
    )
    score = found.records["base", "imdb"].score
    assert score["value"] == pytest.approx(0.7)
    # Both margins, of documents and of Student's t over seeds, in squares.
    margin = math.hypot(0.1, 4.302653 * statistics.stdev(values) / math.sqrt(3))
    assert score["low"] == pytest.approx(max(0, 0.7 - margin))
    assert 0.7 + margin > 1
    assert score["high"] == 1, "no share is larger"
    assert score["deviation"] == pytest.approx(statistics.stdev(values))
    assert score["by_seed"] == values
    assert score["unit"] == "accuracy"
    assert found.records["base", "imdb"].subject["records_by_seed"] == {"3": "3", "1": "1", "2": "2"}
    assert found.records["base", "imdb"].seconds == 4.5
    assert found.recipe == {"seeds": [3, 1, 2]}


@pytest.mark.parametrize("values", [(math.inf, 3.0), (math.inf, math.inf), (math.nan, 3.0)])
def test_figures_that_are_not_finite_have_a_mean_and_seeds_a_list(values: tuple[float, ...], tmp_path: Path) -> None:
    scores = [{"value": value, "low": value, "high": math.nan, "seed": seed} for seed, value in enumerate(values)]
    found = combined({}, {seed: results(a=record("a", str(seed), score)) for seed, score in enumerate(scores)})
    score = found.records["a", "imdb"].score
    assert not math.isfinite(score["value"])
    assert math.isnan(score["deviation"])
    assert score["seed"] == [0, 1]
    write_results(found, tmp_path)
    assert math.isnan(read_results(tmp_path).records["a", "imdb"].score["deviation"])


@pytest.fixture
def recipe(model: Path, study_corpus: str, write: Any) -> dict[str, Any]:
    words = ["good fine", "bad poor"]
    rows = "\n".join(json.dumps({"text": f"{words[i % 2]} film {i}", "label": i % 2}) for i in range(60))
    return {
        "base": str(model),
        "variants": [{"label": "merged", "merge": {"n": 2}}],
        "evaluate": [
            "size",
            {"perplexity": {"corpus": study_corpus}},
            {"imdb": {"data": str(write("rows.jsonl", rows)), "body": False, "train_rows": 20}},
        ],
        "calibration": {"corpus": study_corpus, "tokens": 200},
        "seeds": [0, 1, 2],
    }


def test_a_study_with_seeds_measures_what_depends_on_them_once_each(recipe: dict[str, Any], tmp_path: Path) -> None:
    base = load(recipe["base"])
    running = Study(read_recipe(recipe), tmp_path / "run", base=base)
    made = [(each.label, each.evaluator) for each in running.run()]
    assert made.count(("base", "size")) == made.count(("base", "perplexity")) == 1
    assert made.count(("base", "imdb")) == made.count(("merged", "imdb")) == made.count(("bag of words", "imdb")) == 3
    assert made.count(("merged", "perplexity")) == 3  # the calibration documents come in another order
    assert list(Study(read_recipe(recipe), tmp_path / "run", base=base).run()) == []

    found = running.results()
    alone = []
    for seed in recipe["seeds"]:
        single = {key: value for key, value in recipe.items() if key != "seeds"} | {"seed": seed}
        one = Study(read_recipe(single), tmp_path / "run", base=base)
        assert list(one.run()) == []  # a single seed's records are those of the several
        alone.append(one.results().records["merged", "imdb"].score["value"])
    score = found.records["merged", "imdb"].score
    assert score["by_seed"] == alone
    assert score["value"] == pytest.approx(statistics.fmean(alone))
    assert found.recipe["seeds"] == [0, 1, 2]
    assert "seed" not in found.recipe

    row = dict(table(found).rows)["merged"]
    assert any(cell.interval.startswith("± ") for cell in row)
    write_csv(study_report(found), tmp_path / "results.csv")
    with (tmp_path / "results.csv").open() as file:
        rows = {row["label"]: row for row in csv.DictReader(file)}
    assert float(rows["merged"]["imdb_accuracy_deviation"]) == pytest.approx(statistics.stdev(alone))
    assert rows["base"]["perplexity_deviation"] == ""
    write_results(found, tmp_path)  # all of it is JSON


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"seeds": [1, 1]}, "seeds [1, 1]; accepted: each once"),
        ({"seeds": [1], "seed": 2}, "seed and seeds; accepted: one of the two"),
        ({"seeds": []}, "seeds: List should have at least 1 item"),
        ({"seeds": [-1]}, "seeds[0]"),
    ],
)
def test_seeds_are_given_once_and_not_beside_a_seed(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as raised:
        read_recipe({"variants": []} | wrong)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_evaluators_own_seed_holds_whatever_the_recipes() -> None:
    recipe = read_recipe({"variants": [], "evaluate": [{"imdb": {"seed": 7}}, "rouge"], "seeds": [1, 2]})
    chosen = recipe.with_seed(2)
    assert [each.seed for each in chosen.evaluate] == [7, 2]
    assert (chosen.seed, chosen.seeds) == (2, None)
