"""Rows of a study with a recovery of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CONTEXT, tiny

import layerfold
from layerfold.checkpoint.load import load
from layerfold.errors import CorpusError, RecipeError
from layerfold.methods import Drop
from layerfold.records import BASE_LABEL
from layerfold.recovery import Finetune
from layerfold.search.auto import settled
from layerfold.study import materials
from layerfold.study.recipe import Recipe, read_recipe
from layerfold.study.rows import Built, Load, Student, Trained
from layerfold.study.study import Study

FINETUNE = {"tokens": 128, "learning_rate": 1e-3, "validation_tokens": 64, "evaluations": 1}
TRAINED = {"label": "trained", "drop": {"blocks": "1"}, "repair": "refit", "recovery": {"finetune": FINETUNE}}


def recipe(corpus: str, **changes: Any) -> Recipe:
    return read_recipe(
        {
            "variants": [{"label": "cut", "drop": {"blocks": "1"}, "repair": "refit"}, TRAINED],
            "evaluate": ["size", {"perplexity": {"corpus": corpus}}],
            "calibration": {"corpus": corpus, "tokens": 512, "repair_tokens": 512},
        }
        | changes
    )


def run(study: Study) -> list[tuple[str, str]]:
    return [(record.label, record.evaluator) for record in study.run()]


def test_a_row_is_repaired_and_then_trained_and_the_others_are_not(
    study_corpus: str, tmp_path: Path, steps_taken: list[int]
) -> None:
    base = tiny("gpt2")
    study = Study(recipe(study_corpus), tmp_path / "run", base=base)
    assert run(study) == [(label, name) for label in (BASE_LABEL, "cut", "trained") for name in ("size", "perplexity")]
    assert len(steps_taken) == 1
    (kept,) = (tmp_path / "run" / "models").iterdir()
    found = load(kept)
    assert [step["method"]["name"] for step in found.provenance.steps] == ["drop", "repair", "finetune"]
    cut = layerfold.compress(base, Drop(blocks="1"), corpus=study_corpus, repair="refit", repair_tokens=512)
    by_hand = layerfold.recover(cut, replace(Finetune(**FINETUNE), corpus=study_corpus))
    for name, tensor in by_hand.decoder.model.state_dict().items():
        assert torch.equal(found.decoder.model.state_dict()[name], tensor), name
    results = study.results()
    notes = results.records["trained", "perplexity"].notes
    assert notes["recovered"]["tokens"] == 128
    assert "recovered" not in results.records["cut", "perplexity"].notes
    assert results.score("trained", "perplexity") != results.score("cut", "perplexity")


def test_it_is_trained_once_and_again_only_where_its_training_changes(
    study_corpus: str, tmp_path: Path, steps_taken: list[int]
) -> None:
    base = tiny("gpt2")
    run(Study(recipe(study_corpus), tmp_path, base=base))
    assert run(Study(recipe(study_corpus), tmp_path, base=base)) == []
    longer = {**TRAINED, "recovery": {"finetune": FINETUNE | {"tokens": 2 * 4 * CONTEXT}}}
    changed = recipe(study_corpus, variants=[{**TRAINED, "label": "renamed"}, longer])
    steps_taken.clear()
    assert run(Study(changed, tmp_path, base=base)) == [("trained", "size"), ("trained", "perplexity")]
    assert steps_taken


def test_a_recovery_of_all_rows_comes_on_top(study_corpus: str, tmp_path: Path) -> None:
    both = recipe(
        study_corpus, variants=[TRAINED], recovery={"finetune": FINETUNE | {"corpus": study_corpus, "tokens": 256}}
    )
    study = Study(both, tmp_path, base=tiny("gpt2"))
    run(study)
    models = [load(each) for each in (tmp_path / "models").iterdir()]
    steps = sorted(tuple(step["method"]["name"] for step in each.provenance.steps) for each in models)
    assert steps == [
        ("drop", "repair", "finetune"),
        ("drop", "repair", "finetune", "finetune"),
        ("finetune",),
    ]


def test_training_text_that_is_scored_is_refused(study_corpus: str, tmp_path: Path) -> None:
    on_train = recipe(study_corpus, evaluate=[{"perplexity": {"corpus": study_corpus, "split": "train"}}])
    with pytest.raises(CorpusError, match="must be disjoint"):
        run(Study(on_train, tmp_path, base=tiny("gpt2")))


def test_a_recipe_with_it_reads_back_as_itself(study_corpus: str) -> None:
    found = recipe(study_corpus)
    assert read_recipe(found.to_json()) == found
    row = found.variants[1].row
    assert row == Trained(Built(Drop(blocks="1"), "refit"), Finetune(**FINETUNE))
    assert row.trained_tokens == 128
    assert found.variants[0].row.trained_tokens == 0


def test_other_kinds_of_rows_are_trained_too_and_the_published_student_still_stands_in(study_corpus: str) -> None:
    student = {
        "label": "s",
        "student": {"tokens": 256, "published": {"big": "small"}},
        "recovery": {"finetune": FINETUNE},
    }
    found = recipe(study_corpus, variants=[student])
    (variant,) = found.variants
    assert isinstance(variant.row, Trained)
    assert isinstance(variant.row.row, Student)
    assert variant.row.trained_tokens == 256 + 128
    assert variant.for_base("other") == variant
    replaced = variant.for_base("big")
    assert replaced.row == Trained(Load("small"), Finetune(**FINETUNE))


@pytest.mark.parametrize(
    ("recovery", "said"),
    [
        ({"fintune": {}}, "unknown recovery 'fintune'; did you mean 'finetune'?"),
        ("finetune", "'finetune'; accepted: one of distill, finetune, lowrank, with its settings"),
        ({"finetune": {"tokens": 0}}, "tokens 0; accepted"),
        ({"finetune": {}, "distill": {}}, "accepted: one of distill, finetune, lowrank"),
    ],
)
def test_what_is_wrong_with_it_is_one_line(study_corpus: str, recovery: Any, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(study_corpus, variants=[{**TRAINED, "recovery": recovery}])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_that_leave_the_same_to_a_search_share_it(
    study_corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []

    def counted(method: Any, *words: Any) -> Any:
        found.append(method.name)
        return settled(method, *words)

    monkeypatch.setattr(materials, "settled", counted)
    auto = {"n": 2, "groups": "auto", "align": "none"}
    variants = [
        {"label": "merged", "merge": auto},
        {"label": "merged and repaired", "merge": auto, "repair": "refit"},
        {"label": "collapsed", "collapse": auto},
    ]
    study = Study(recipe(study_corpus, variants=variants), tmp_path, base=tiny("gpt2"))
    run(study)
    assert found == ["merge", "collapse"]
    notes = [study.results().records[each["label"], "perplexity"].notes for each in variants]
    assert notes[0]["search"] == notes[1]["search"]
    assert "repaired" in notes[1]
