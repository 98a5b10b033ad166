"""Rows of a study that are distilled from the base: made once, kept, and known by all that makes them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BLOCKS, CONTEXT, Write, prose, tiny, tokenizer

import layerfold
from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import Model
from layerfold.checkpoint.provenance import Provenance
from layerfold.errors import CorpusError, InputError
from layerfold.methods import Drop
from layerfold.model.decoder import Decoder
from layerfold.records import BASE_LABEL, RECOVERY, RecordStore
from layerfold.recovery import Distill, callbacks
from layerfold.report.drawing import family
from layerfold.study.recipe import Recipe, read_recipe
from layerfold.study.rows import Load, Student
from layerfold.study.study import Replicate, Study

STUDENT: dict[str, Any] = {"tokens": 256, "learning_rate": 1e-3}
STEPS = 2
FINETUNE = {"tokens": 128, "learning_rate": 1e-3, "validation_tokens": 64, "evaluations": 1}


@pytest.fixture(scope="module")
def base() -> Model:
    """A teacher that knows the text, so that learning from it helps."""
    model = tiny("gpt2", n_embd=16)
    ids = torch.tensor(tokenizer()(prose(2200, seed=77))["input_ids"])
    network = model.decoder.model
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for batch in ids[: 32 * 8 * CONTEXT].view(32, 8, CONTEXT):
        network(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return Model(Decoder(network), model.tokenizer, Provenance("taught"))


def recipe(corpus: str, student: dict[str, Any] = STUDENT, recovers: bool = False, **changes: Any) -> Recipe:
    return read_recipe(
        {
            "variants": [{"label": "pupil", "student": student}],
            "evaluate": ["size", {"perplexity": {"corpus": corpus}}],
            "calibration": {"corpus": corpus, "tokens": 512},
            "recovery": {"finetune": FINETUNE | {"corpus": corpus}} if recovers else None,
        }
        | changes
    )


def run(study: Study) -> list[tuple[str, str]]:
    return [(record.label, record.evaluator) for record in study.run()]


def kept(folder: Path) -> dict[tuple[str, ...], Model]:
    """The trained models of a study, by what was done to them."""
    found = [load(each) for each in (folder / "models").iterdir()]
    return {tuple(step["method"]["name"] for step in each.provenance.steps): each for each in found}


def figures(study: Study) -> list[Any]:
    results = study.results()
    scores = [dict(results.score(label, name) or {}) for label in results.labels for name in results.evaluators]
    return [{key: value for key, value in score.items() if key != "seconds"} for score in scores]


class Killed(BaseException):
    pass


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Callable[[], None]]:
    """Kill at the n-th step that any training takes; return what calls it off."""
    original = callbacks.Bar.on_step_end

    def at(count: int) -> Callable[[], None]:
        left = [count]

        def on_step_end(self: Any, *_: Any, **__: Any) -> None:
            left[0] -= 1
            if not left[0]:
                raise Killed

        monkeypatch.setattr(callbacks.Bar, "on_step_end", on_step_end)
        return lambda: monkeypatch.setattr(callbacks.Bar, "on_step_end", original)

    return at


# What it is


@pytest.fixture(scope="module")
def whole(base: Model, study_corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study that ran to its end."""
    study = Study(recipe(study_corpus), tmp_path_factory.mktemp("whole") / "run", base=base)
    assert run(study) == [(label, name) for label in (BASE_LABEL, "pupil") for name in ("size", "perplexity")]
    return study


@pytest.fixture
def done(whole: Study, tmp_path: Path) -> Path:
    """A copy of its folder."""
    return Path(shutil.copytree(whole.output_dir, tmp_path / "run"))


def test_a_student_is_the_base_s_blocks_distilled_from_the_base(base: Model, whole: Study, study_corpus: str) -> None:
    halved = layerfold.compress(base, Drop(blocks=(1, 3)))
    distillation = Distill(tokens=256, learning_rate=1e-3, corpus=study_corpus)
    by_hand = layerfold.recover(halved, distillation, teacher=base)
    (pupil,) = kept(whole.output_dir).values()
    for name, tensor in by_hand.decoder.model.state_dict().items():
        assert torch.equal(tensor, pupil.decoder.model.state_dict()[name]), name
    assert pupil.sha256 != halved.sha256, "it did learn"
    assert [step["method"]["name"] for step in pupil.provenance.steps] == ["drop", "distill"]
    assert pupil.provenance.steps[0]["kept_blocks"] == [0, 2]
    results = whole.results()
    scored = layerfold.evaluate(by_hand, ["perplexity"], corpus=study_corpus, split="test")["perplexity"]
    assert results.score("pupil", "perplexity")["value"] == pytest.approx(scored.value)  # type: ignore[index]
    assert results.score("pupil", "size")["blocks"] == 2  # type: ignore[index]
    assert json.loads(json.dumps(results.to_json(), allow_nan=False))["recipe"]["variants"] == [
        {"label": "pupil", "student": {"every": 2, **STUDENT, "published": {}}}
    ]
    assert Model(base.decoder, base.tokenizer, base.provenance).sha256 == base.sha256
    assert not list(whole.output_dir.glob("training/*")), "nothing is left of training"


@pytest.mark.parametrize(
    ("every", "depth", "gone"),
    [(2, 2, (1,)), (2, 4, (1, 3)), (2, 5, (1, 3)), (3, 4, (1, 2)), (3, 7, (1, 2, 4, 5)), (9, 4, (1, 2, 3))],
)
def test_which_blocks_are_left(every: int, depth: int, gone: tuple[int, ...]) -> None:
    assert Student(every=every).drop(tiny("gpt2", n_layer=depth).decoder).indices(depth) == list(gone)


# What is done once


def test_a_student_is_trained_once_and_again_where_what_was_kept_is_damaged(
    base: Model, whole: Study, done: Path, study_corpus: str, steps_taken: list[int]
) -> None:
    assert run(Study(recipe(study_corpus), done, base=base)) == []
    more = {"evaluate": ["size", {"perplexity": {"corpus": study_corpus, "context": 16}}]}
    assert run(Study(recipe(study_corpus, **more), done, base=base)) == [
        (label, "perplexity") for label in (BASE_LABEL, "pupil")
    ]
    assert family(whole.results(), "pupil") == "student"  # and no drop, in the plots
    (folder,) = (done / "models").iterdir()
    for damaged in (False, True):
        for record in (done / "records").iterdir():
            record.unlink()
        if damaged:
            weights = folder / "layerfold.safetensors"
            weights.write_bytes(weights.read_bytes()[:-9])
        again = Study(recipe(study_corpus), done, base=base)
        assert len(run(again)) == 4
        assert figures(again) == figures(whole)
        assert len(steps_taken) == STEPS * damaged, "the kept model was read"


@pytest.mark.parametrize("recovers", [False, True], ids=["alone", "recovered"])
def test_a_study_killed_while_a_student_learns_goes_on(
    recovers: bool, base: Model, study_corpus: str, tmp_path: Path, steps_taken: list[int], kill: Any
) -> None:
    wanted = recipe(study_corpus, STUDENT | {"tokens": 512}, recovers)
    whole = Study(wanted, tmp_path / "whole", base=base)
    run(whole)
    steps_taken.clear()
    call_off = kill(3 + recovers)  # the base's recovery is one step
    done = []
    with pytest.raises(Killed):
        done.extend(Study(wanted, tmp_path / "run", base=base).run())
    assert {record.label for record in done} == {BASE_LABEL}
    call_off()
    steps_taken.clear()
    again = Study(wanted, tmp_path / "run", base=base)
    assert {label for label, _ in run(again)} == {"pupil"}
    assert steps_taken[-1 - recovers] == 4
    assert 1 not in steps_taken[: len(steps_taken) - recovers], "not from the beginning"
    assert figures(again) == figures(whole)


def test_a_study_killed_in_the_recovery_of_a_student_does_not_teach_it_again(
    base: Model, study_corpus: str, tmp_path: Path, steps_taken: list[int], kill: Any
) -> None:
    wanted = recipe(study_corpus, recovers=True)
    whole = Study(wanted, tmp_path / "whole", base=base)
    run(whole)
    assert steps_taken == [1, 1, 2, 1], "the base's recovery, the student, its recovery"
    call_off = kill(4)
    with pytest.raises(Killed):
        run(Study(wanted, tmp_path / "run", base=base))
    call_off()
    assert ("drop", "distill") in kept(tmp_path / "run")
    steps_taken.clear()
    again = Study(wanted, tmp_path / "run", base=base)
    assert run(again) == [("pupil", name) for name in (RECOVERY, "size", "perplexity")]
    assert len(steps_taken) <= 1
    assert figures(again) == figures(whole)


def test_recovery_comes_on_top(
    base: Model, whole: Study, done: Path, study_corpus: str, steps_taken: list[int]
) -> None:
    study = Study(recipe(study_corpus, recovers=True), done, base=base)
    assert run(study) == [(label, name) for label in (BASE_LABEL, "pupil") for name in (RECOVERY, "size", "perplexity")]
    assert steps_taken == [1, 1], "the student is there already"
    models = kept(done)
    assert models.keys() == {("drop", "distill"), ("finetune",), ("drop", "distill", "finetune")}
    pupil, recovered = models["drop", "distill"], models["drop", "distill", "finetune"]
    assert pupil.decoder.n_blocks == recovered.decoder.n_blocks == 2
    assert pupil.sha256 != recovered.sha256
    score = study.results().score("pupil", RECOVERY)
    assert score is not None
    assert score["method"] == "finetune"
    assert score["before"]["value"] == whole.results().score("pupil", "perplexity")["value"]  # type: ignore[index]


# What it is known by


def subjects(given: Recipe, base: Model, folder: Path) -> list[dict[str, Any]]:
    replicate = Replicate(given.for_base(base), base, folder, RecordStore(folder))
    return [replicate.subject("pupil", after) for after in ([False, True] if given.recovery else [False])]


@pytest.mark.parametrize("recovers", [False, True], ids=["alone", "recovered"])
def test_what_makes_a_student_is_in_its_subject(
    recovers: bool, base: Model, study_corpus: str, write: Write, tmp_path: Path
) -> None:
    other = str(write("text/other.txt", "\n\n".join(prose(30, seed) for seed in range(100, 160))))
    plain = recipe(study_corpus, recovers=recovers)
    known = subjects(plain, base, tmp_path)
    assert json.loads(json.dumps(known)) == known
    changed = {
        "tokens": recipe(study_corpus, STUDENT | {"tokens": 384}, recovers),
        "rate": recipe(study_corpus, STUDENT | {"learning_rate": 2e-3}, recovers),
        "a rate that is chosen": recipe(study_corpus, STUDENT | {"learning_rate": None}, recovers),
        "every": recipe(study_corpus, STUDENT | {"every": 3}, recovers),
        "seed": recipe(study_corpus, recovers=recovers, seed=1),
        "text": recipe(study_corpus, recovers=recovers, calibration={"corpus": other}),
    }
    seen = [known, *(subjects(each, base, tmp_path) for each in changed.values())]
    seen.append(subjects(plain, tiny("gpt2", seed=1), tmp_path))
    for after in range(1 + recovers):
        assert len({json.dumps(each[after], sort_keys=True) for each in seen}) == len(seen)
    for same in (
        recipe(study_corpus, STUDENT | {"published": {"gpt2": "distilgpt2"}}, recovers),
        recipe(study_corpus, STUDENT | {"every": 2}, recovers),
        recipe(study_corpus, recovers=recovers, evaluate=["size"]),
        recipe(study_corpus, recovers=recovers, calibration={"corpus": study_corpus, "tokens": 99}),
    ):
        assert subjects(same, base, tmp_path) == known


def test_a_changed_student_is_trained_again_and_no_other_row(
    base: Model, study_corpus: str, done: Path, steps_taken: list[int]
) -> None:
    variants = [{"label": "pupil", "student": STUDENT | {"tokens": 384}}]
    changed = Study(recipe(study_corpus, variants=variants), done, base=base)
    assert run(changed) == [("pupil", "size"), ("pupil", "perplexity")]
    assert steps_taken == [1, 2, 3]
    assert run(Study(recipe(study_corpus), done, base=base)) == [], "the records of both are kept"
    steps_taken.clear()
    variants = [{"label": f"every_{every}", "student": STUDENT | {"every": every}} for every in (2, 3, 4)]
    beside = Study(recipe(study_corpus, variants=variants, evaluate=["size"]), done, base=base)
    run(beside)
    assert steps_taken == [1, 2] * 2, "each that is not there already"
    assert [beside.results().score(label, "size")["blocks"] for label in beside.labels] == [4, 2, 2, 1]  # type: ignore[index]


# Those that there are already


def test_a_published_student_is_loaded_for_its_base_alone(
    model: Path, study_corpus: str, tmp_path: Path, steps_taken: list[int]
) -> None:
    theirs = tmp_path / "theirs"
    tiny("gpt2", seed=5, n_layer=3).save(theirs)
    student = STUDENT | {"published": {str(model): str(theirs), "gpt2": "distilgpt2"}}
    study = Study(recipe(study_corpus, student, base=str(model), evaluate=["size"]), tmp_path / "run")
    records = {record.label: record for record in study.run()}
    assert steps_taken == []
    assert study.recipe.variants[0].method == Load(str(theirs))
    method = records["pupil"].subject["method"]
    assert (method["name"], method["sha256"]) == ("load", load(theirs).sha256)
    assert records["pupil"].score["blocks"] == 3
    copied = tmp_path / "copied"
    model.rename(copied)
    other = Study(recipe(study_corpus, student, base=str(copied), evaluate=["size"]), tmp_path / "other")
    assert {record.label: record.score["blocks"] for record in other.run()} == {BASE_LABEL: 4, "pupil": 2}
    assert steps_taken == [1, 2]


# What is refused


def test_a_base_of_one_block_has_no_student(study_corpus: str, tmp_path: Path) -> None:
    message = "^variant 'pupil': a student of a model of 1 block; accepted: 2 blocks or more$"
    with pytest.raises(InputError, match=message):
        Study(recipe(study_corpus), tmp_path / "run", base=tiny("gpt2", n_layer=1))
    assert not (tmp_path / "run").exists()


def test_fewer_tokens_than_a_step_takes_are_one_line(base: Model, study_corpus: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"variant 'pupil': tokens 9; accepted: 128 or more, one step") as caught:
        run(Study(recipe(study_corpus, STUDENT | {"tokens": 9}), tmp_path / "run", base=base))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("split", ["validation", "train"])
def test_a_student_may_not_learn_from_test_text(split: str, base: Model, write: Write, tmp_path: Path) -> None:
    line = "the same words are in both of them"
    documents = [f"{prose(30, seed)} {seed}" for seed in range(60)]
    # Files by the names of splits: which split a text is in is not to depend on its hash here.
    for name, some in (("test", documents[:6]), ("validation", documents[6:12]), ("train", documents[12:])):
        write(f"one/{name}.txt", "\n\n".join([*some, line] if name == split else some))
    source = str(tmp_path / "one")
    other = str(write("two/test.txt", "\n\n".join([line, *(f"other text {i}" for i in range(12))])).parent)
    with pytest.raises(CorpusError, match=f"1 documents stand in both .*'{line}'"):
        run(Study(recipe(source, evaluate=[{"perplexity": {"corpus": other}}]), tmp_path / "run", base=base))
    assert not (tmp_path / "run" / "models").exists()


def test_each_seed_has_a_student_of_its_own(
    base: Model, study_corpus: str, tmp_path: Path, steps_taken: list[int]
) -> None:
    study = Study(recipe(study_corpus, seeds=[1, 2]), tmp_path / "run", base=base)
    done = run(study)
    assert done.count(("pupil", "perplexity")) == 2
    assert done.count((BASE_LABEL, "perplexity")) == 1, "which depends on no seed"
    assert steps_taken == [1, 2] * 2
    one, two = (load(folder) for folder in (tmp_path / "run" / "models").iterdir())
    assert one.sha256 != two.sha256
    assert one.decoder.n_blocks == BLOCKS // 2
    score = study.results().score("pupil", "perplexity")
    assert score is not None
    assert sum(score["by_seed"]) / 2 == pytest.approx(score["value"])
    assert score["deviation"] > 0
