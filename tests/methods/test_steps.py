"""Several methods one after the other: what they come to, what is said of them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BLOCKS, tiny

import layerfold
from layerfold.calibration import Calibration, calibration_windows
from layerfold.checkpoint.load import load
from layerfold.errors import InputError
from layerfold.methods import Collapse, Drop, Merge, Prune, Share, Steps
from layerfold.pipeline import _together
from layerfold.study.recipe import read_recipe
from layerfold.study.study import Study

NEURONS = Prune(sparsity=0.25, structure="neurons", criterion="wanda", scope="global")
LACKING = Drop(blocks="1")


def same(one: Any, two: Any) -> bool:
    a, b = (model.decoder.model.state_dict() for model in (one, two))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def text(study_corpus: str) -> dict[str, Any]:
    return {"corpus": study_corpus, "tokens": 300}


@pytest.mark.parametrize("steps", [(LACKING, NEURONS), (Collapse(n=2), Merge(n=2, tie=True))])
def test_steps_are_what_one_compression_after_the_other_comes_to(steps: Any, text: Any, tmp_path: Path) -> None:
    """Each reads the decoder as the one before left it."""
    at_once = layerfold.compress(tiny("gpt2"), Steps(steps), **text)
    first = layerfold.compress(tiny("gpt2"), steps[0], **text)
    assert same(at_once, layerfold.compress(first, steps[1], **text))
    at_once.save(tmp_path / "made", format="compact")
    assert same(load(tmp_path / "made"), at_once)


def test_steps_apply_without_a_model_too(study_corpus: str) -> None:
    model, steps = tiny("gpt2"), Steps((LACKING, NEURONS))
    notes = steps.apply(model.decoder, Calibration(model.decoder, calibration_windows(model, study_corpus, 300, 0)))
    made = layerfold.compress(tiny("gpt2"), steps, corpus=study_corpus, tokens=300)
    assert same(model, made)
    assert notes == made.provenance.steps[-1]["notes"]


def test_a_repair_aims_at_the_model_before_the_first_step(text: Any) -> None:
    text |= {"repair_tokens": 600}
    made = layerfold.compress(tiny("gpt2"), Steps((LACKING, NEURONS)), repair="refit", **text)
    done = made.provenance.steps
    assert [step["method"]["name"] for step in done] == ["drop", "prune", "repair"]
    assert [step["kept_blocks"] for step in done[:2]] == [[0, 2, 3], [0, 1, 2]]
    repaired = {each["block"]: each for each in done[2]["notes"]["repaired"]}
    assert sorted(repaired) == [0, 1, 2]
    # What block 0 misses is measured against what enters the original's block 2: far more than its own neurons' part.
    alone = layerfold.compress(tiny("gpt2"), NEURONS, repair="refit", **text).provenance.steps[1]["notes"]["repaired"]
    assert repaired[0]["error"] > alone[0]["error"]


def test_a_study_measures_a_row_of_steps(study_corpus: str, model: Path, tmp_path: Path) -> None:
    row = {"label": "both", "steps": [{"drop": {"blocks": "1"}}, {"prune": {"sparsity": 0.5, "structure": "neurons"}}]}
    calibration = {"corpus": study_corpus, "tokens": 200}
    document = {"base": str(model), "variants": [row], "evaluate": ["size"], "calibration": calibration}
    recipe = read_recipe(document)
    study = Study(recipe, tmp_path / "run")
    list(study.run())
    expected = layerfold.compress(load(model), Steps((LACKING, Prune(sparsity=0.5, structure="neurons"))))
    assert study.results().records["both", "size"].score["value"] == expected.decoder.size().parameters


def test_a_first_step_that_the_base_does_not_admit_is_refused_before_any_work() -> None:
    with pytest.raises(InputError, match=f"blocks 0 ... {BLOCKS - 1}"):
        Steps((Drop(blocks="9"), NEURONS)).resolved(tiny("gpt2").decoder)


def test_a_later_step_that_the_earlier_ones_rule_out_is_refused() -> None:
    with pytest.raises(InputError, match=r"blocks 0 \.\.\. 2"):
        layerfold.compress(tiny("gpt2"), Steps((LACKING, Drop(blocks="3"))))


def test_steps_need_calibration_where_one_of_them_does() -> None:
    assert Steps((LACKING, NEURONS)).needs_calibration
    assert not Steps((LACKING, Prune(sparsity=0.5))).needs_calibration
    assert Steps((Share(window="0:2"), LACKING)).needs_calibration


def test_a_step_that_fails_in_a_study_is_named(study_corpus: str, model: Path, tmp_path: Path) -> None:
    row = {"label": "both", "steps": [{"drop": {"blocks": "0-1"}}, {"drop": {"blocks": "3"}}]}
    recipe = read_recipe({"base": str(model), "variants": [row], "evaluate": ["size"]})
    with pytest.raises(InputError, match=r"^variant 'both': blocks '3'"):
        list(Study(recipe, tmp_path / "run").run())


def test_every_warning_of_every_step_is_told() -> None:
    assert _together({"warning": "one", "a": 1}, {"warning": "two", "a": 2}) == {"warning": "one; two", "a": 2}
    assert _together({"a": 1}, {"b": 2}) == {"a": 1, "b": 2}
