"""`layerfold plan`, typed: what it writes, what it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny

from layerfold.checkpoint.load import load
from layerfold.planning.candidates import count
from layerfold.study.recipe import read_recipe

FEW = ("--calibration-tokens", 300, "--repair-tokens", 1200, "--tokens", 200, "--test-tokens", 150)
QUICK = (*FEW, "--rounds", 0, "--points", 0)


def test_a_plan_leaves_a_checkpoint_its_recipe_and_its_report(
    layerfold: Any, model: Path, study_corpus: str, tmp_path: Path
) -> None:
    folder = tmp_path / "plan"
    words = ("--model", model, "--corpus", study_corpus, "--parameters", "80%", "--output-dir", folder, *QUICK)
    done = layerfold("plan", *words)
    assert done.code == 0, done.err
    made = load(folder / "model")
    document = json.loads((folder / "plan.json").read_text())
    assert count(made.decoder) == document["winner"]["parameters"] <= 0.8 * count(tiny("gpt2").decoder)
    assert [step["method"]["name"] for step in made.provenance.steps][-1:] != []
    (row,) = read_recipe(folder / "recipe.yaml").variants
    assert row.label == "planned"
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    assert len((folder / "trials.csv").read_text().splitlines()) == len(document["trials"]) + 1
    assert str(folder / "recipe.yaml") in done.out.replace("\n", "")
    assert layerfold("study", folder / "recipe.yaml", "--output-dir", tmp_path / "run").code == 0


def test_another_budget_goes_on_in_the_same_folder(
    layerfold: Any, model: Path, study_corpus: str, tmp_path: Path
) -> None:
    words = ("plan", "--model", model, "--corpus", study_corpus, "--output-dir", tmp_path / "plan", *QUICK)
    assert layerfold(*words, "--parameters", "80%").code == 0
    before = json.loads((tmp_path / "plan" / "trials.json").read_text())
    assert layerfold(*words, "--parameters", "75%").code == 0
    after = json.loads((tmp_path / "plan" / "trials.json").read_text())
    assert before.keys() < after.keys()
    assert json.loads((tmp_path / "plan" / "plan.json").read_text())["settings"]["parameters"] == "75%"


def test_json_is_one_document_and_nothing_else(layerfold: Any, model: Path, study_corpus: str, tmp_path: Path) -> None:
    words = ("--model", model, "--corpus", study_corpus, "--perplexity", "+20%", "--output-dir", tmp_path / "plan")
    done = layerfold("plan", *words, *QUICK, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["budget"]["kind"] == "perplexity"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "accepted: one of the three"),
        (("--parameters", "80%", "--speedup", "1.5"), "accepted: one of the three"),
        (("--parameters", "eighty"), "parameters 'eighty'; accepted: a count"),
        (("--parameters", "100%"), "accepted: below the model's"),
        (("--parameters", "2%"), "is 1,206; accepted: 9,761 ... 60,319"),
        (("--speedup", "0.9"), "speedup 0.9; accepted: above 1"),
        (("--perplexity", "10"), "perplexity '10'; accepted: how much higher"),
        (("--parameters", "80%", "--points", "-1"), "points -1; accepted: 0 or more"),
        (("--parameters", "80%", "--corpus", "imbd"), "imdb"),
    ],
)
def test_bad_input_is_one_line(
    layerfold: Any, model: Path, study_corpus: str, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    corpus = () if "--corpus" in words else ("--corpus", study_corpus)
    done = layerfold("plan", "--model", model, *corpus, "--output-dir", tmp_path / "plan", *QUICK, *words)
    assert done.code == 2
    (line,) = done.err.strip().splitlines()
    assert said in line
    assert not (tmp_path / "plan" / "model").exists()


def test_a_folder_of_something_else_is_left_alone(
    layerfold: Any, model: Path, study_corpus: str, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    words = ("--model", model, "--corpus", study_corpus, "--parameters", "80%", "--output-dir", tmp_path / "mine")
    done = layerfold("plan", *words, *QUICK)
    assert done.code == 2
    assert "--overwrite" in done.err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_the_model_that_is_planned_is_not_written_over(layerfold: Any, model: Path, study_corpus: str) -> None:
    before = sorted((path.name, path.read_bytes()) for path in model.iterdir())
    words = ("--model", model, "--corpus", study_corpus, "--parameters", "80%", *QUICK)
    for more in ((), ("--overwrite",)):
        done = layerfold("plan", *words, "--output-dir", model.parent, *more)
        assert (done.code, len(done.err.strip().splitlines())) == (2, 1)
        assert "accepted: another --output-dir" in done.err
    assert sorted((path.name, path.read_bytes()) for path in model.iterdir()) == before


def test_a_checkpoint_that_is_no_plans_is_not_replaced(
    layerfold: Any, model: Path, study_corpus: str, tmp_path: Path
) -> None:
    tiny("llama").save(tmp_path / "other" / "model")
    words = ("--model", model, "--corpus", study_corpus, "--parameters", "80%", *QUICK, "--overwrite")
    done = layerfold("plan", *words, "--output-dir", tmp_path / "other")
    assert done.code == 2
    assert "is no plan's" in done.err
    assert "rms" in str(load(tmp_path / "other" / "model").decoder.norm).lower()


def test_a_plan_of_another_model_is_replaced_only_when_told_to(
    layerfold: Any, model: Path, study_corpus: str, tmp_path: Path
) -> None:
    tiny("gpt2", seed=1).save(tmp_path / "second")
    words = ("--corpus", study_corpus, "--parameters", "80%", *QUICK, "--output-dir", tmp_path / "plan")
    assert layerfold("plan", "--model", model, *words).code == 0
    done = layerfold("plan", "--model", tmp_path / "second", *words)
    assert done.code == 2
    assert "holds a plan of another model" in done.err
    assert layerfold("plan", "--model", tmp_path / "second", *words, "--overwrite").code == 0
