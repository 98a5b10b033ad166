"""`layerfold plan`, typed: what it writes, what it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny
from transformers import AutoModelForCausalLM

from layerfold.checkpoint.load import load
from layerfold.checkpoint.weighing import parameters as count
from layerfold.study.recipe import read_recipe

FEW = ("--calibration-tokens", 300, "--repair-tokens", 600, "--tokens", 200, "--test-tokens", 150)
QUICK = (*FEW, "--rounds", 0, "--points", 0)


@pytest.fixture
def plan(layerfold: Any, model: Path, study_corpus: str, tmp_path: Path) -> Any:
    """Plan for 80 % of the parameters of the checkpoint, or another, on little text."""

    def plan(*words: object, of: Path = model, out: Path = tmp_path / "plan", code: int = 0) -> Any:
        budget = () if "--parameters" in words else ("--parameters", "80%")
        where = ("--model", of, "--corpus", study_corpus, "--output-dir", out)
        done = layerfold("plan", *where, *budget, *QUICK, *words)
        assert done.code == code, done.err
        return done

    return plan


def test_a_plan_leaves_a_checkpoint_its_recipe_and_its_report_and_goes_on_in_its_folder(
    plan: Any, layerfold: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "plan"
    done = plan()
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
    # JSON is one document and nothing else.
    assert json.loads(plan("--json").out)["budget"]["kind"] == "parameters"
    # Another budget goes on in the same folder.
    before = json.loads((folder / "trials.json").read_text())
    plan("--parameters", "75%")
    assert before.keys() < json.loads((folder / "trials.json").read_text()).keys()
    assert json.loads((folder / "plan.json").read_text())["settings"]["parameters"] == "75%"
    # A plan of another model is replaced only when it is told to.
    other = tmp_path / "second"
    tiny("gpt2", seed=1, n_layer=2).save(other)
    assert "holds a plan of another model" in plan(of=other, code=2).err
    plan("--overwrite", of=other)


def test_a_uniform_plan_is_dense_and_as_small_in_plain_transformers(plan: Any, tmp_path: Path) -> None:
    done = plan("--uniform", "--multiple-of", 8)
    folder = tmp_path / "plan"
    document = json.loads((folder / "plan.json").read_text())
    winner = document["winner"]
    assert winner["dense_bytes"] == winner["compact_bytes"] == 4 * winner["parameters"]
    assert "(dense, float32; on disk: 0.24 MB -> " in done.out
    plain = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert plain.num_parameters() == winner["parameters"] <= 0.8 * count(tiny("gpt2").decoder)
    card = (folder / "model" / "README.md").read_text()
    test = winner["test"]["perplexity"]
    assert f"| perplexity | {test['value']:,.4g} | {test['low']:,.4g} ... {test['high']:,.4g} | perplexity-" in card
    # The other kind is shown, and not taken.
    free = [trial for trial in document["trials"] if trial["dense_bytes"] > trial["compact_bytes"]]
    assert [trial["family"] for trial in free] == ["prune"]
    assert free[0]["row"] not in document["front"]


def test_what_is_dense_as_small_is_written_so_and_nothing_else(plan: Any, tmp_path: Path) -> None:
    done = plan()
    winner = json.loads((tmp_path / "plan" / "plan.json").read_text())["winner"]
    form = "dense" if winner["dense_bytes"] == winner["compact_bytes"] else "compact"
    assert f"({form}, float32; on disk: " in done.out
    assert "(compact, float32; on disk: " in plan("--format", "compact").out


def test_a_folder_of_something_else_is_left_alone(plan: Any, write: Any) -> None:
    folder = write("mine/letter.txt", "dear").parent
    assert "--overwrite" in plan(out=folder, code=2).err
    assert [path.name for path in folder.iterdir()] == ["letter.txt"]


def test_the_model_that_is_planned_is_not_written_over(plan: Any, model: Path) -> None:
    before = sorted((path.name, path.read_bytes()) for path in model.iterdir())
    for more in ((), ("--overwrite",)):
        done = plan(*more, out=model.parent, code=2)
        assert len(done.err.strip().splitlines()) == 1
        assert "accepted: another --output-dir" in done.err
    assert sorted((path.name, path.read_bytes()) for path in model.iterdir()) == before


def test_a_checkpoint_that_is_no_plans_is_not_replaced(plan: Any, tmp_path: Path) -> None:
    tiny("llama").save(tmp_path / "other" / "model")
    assert "is no plan's" in plan("--overwrite", out=tmp_path / "other", code=2).err
    assert "rms" in str(load(tmp_path / "other" / "model").decoder.norm).lower()
