"""Studies with recovery: what is recorded before and after, what is trained once, what survives a kill."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import runs
from runs import Train
from tiny import VOCABULARY, Write, count_steps, prose, refused

import layerfold
from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import Model
from layerfold.errors import CorpusError, InputError, LayerfoldError, TrainingError
from layerfold.files import hash_json
from layerfold.methods import Merge
from layerfold.records import BASE_LABEL, RECOVERY, Record
from layerfold.recovery import callbacks
from layerfold.study.recipe import Recipe, read_recipe
from layerfold.study.study import Study

FINETUNE = {"finetune": {"tokens": 256, "context": 16, "batch_size": 4, "learning_rate": 3e-3, "validation_tokens": 64}}
DISTILL = {"distill": FINETUNE["finetune"] | {"lm_weight": 0.5}}
VARIANTS = [
    {"label": "half", "collapse": {"n": 2, "align": "none"}},
    {"label": "tied", "merge": {"n": 2, "align": "none", "tie": True}},
]
LABELS = (BASE_LABEL, "half", "tied")


def recipe(corpus: str, recovery: dict[str, Any] | None = FINETUNE, **changes: Any) -> Recipe:
    if recovery is not None:
        ((name, settings),) = recovery.items()
        recovery = {name: {"corpus": corpus} | settings}
    document = {"variants": VARIANTS, "evaluate": ["size", {"perplexity": {"corpus": corpus}}], "recovery": recovery}
    return read_recipe(document | changes)


def run(study: Study) -> list[tuple[str, str]]:
    return [(record.label, record.evaluator) for record in study.run()]


Make = Callable[..., Study]


@pytest.fixture
def make(taught: Model, study_corpus: str, tmp_path: Path) -> Make:
    """A study of the taught model, in a folder of the test's own."""

    def make(recovery: dict[str, Any] | None = FINETUNE, at: Path = Path("run"), **changes: Any) -> Study:
        return Study(recipe(study_corpus, recovery, **changes), tmp_path / at, base=taught)

    return make


@dataclass
class Done:
    """A study that was run to its end, with recovery by distillation."""

    folder: Path
    study: Study
    order: list[tuple[str, str]]
    steps_taken: int


@pytest.fixture(scope="session")
def _done(_taught: Model, study_corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Done:
    study = Study(recipe(study_corpus, DISTILL), tmp_path_factory.mktemp("done") / "run", base=_taught.copy())
    with pytest.MonkeyPatch.context() as patch:
        taken = count_steps(patch)
        order = run(study)
    return Done(study.output_dir, study, order, len(taken))


@pytest.fixture
def done(_done: Done, tmp_path: Path) -> Done:
    """The study, in a folder of its own."""
    return replace(_done, folder=shutil.copytree(_done.folder, tmp_path / "run"))


def test_every_row_is_measured_before_and_after_and_the_base_is_trained_too(
    done: Done, taught: Model, train: Train
) -> None:
    study = done.study
    assert done.order == [(label, name) for label in LABELS for name in ("perplexity", RECOVERY, "size", "perplexity")]
    assert done.steps_taken == 3 * 4
    results = study.results()
    assert results.evaluators == ("size", "perplexity", RECOVERY)
    for label in LABELS:
        recovery, after = results.score(label, RECOVERY), results.score(label, "perplexity")
        assert recovery is not None
        assert after is not None
        untrained, _ = study.replicates[study.recipe.seed].build(label)
        score = layerfold.evaluate(untrained, ["perplexity"], corpus=train.corpus, split="test")["perplexity"]
        assert recovery["before"] == {bound: pytest.approx(getattr(score, bound)) for bound in ("value", "low", "high")}
        assert recovery["method"] == "distill"
        assert recovery["steps"] == 4
        assert recovery["value"] == recovery["validation_perplexity"]
        assert len(recovery["curve"]["validation"]) == 5
    half, base = (results.score(label, "perplexity") for label in ("half", BASE_LABEL))
    assert half is not None
    assert base is not None
    assert half["value"] < results.score("half", RECOVERY)["before"]["value"]  # type: ignore[index]
    assert half["versus_base"]["value"] == pytest.approx(half["value"] / base["value"]), "the base after its training"
    assert [results.score(label, "size")["blocks"] for label in LABELS] == [4, 2, 4]  # type: ignore[index]
    assert runs.difference(study.base, taught) == 0
    assert json.loads(json.dumps(results.to_json(), allow_nan=False))["recipe"]["recovery"]["distill"]["tokens"] == 256
    assert not list(done.folder.glob("training/*")), "nothing is left of training"


def test_a_tied_variant_is_still_tied_after_training(done: Done, taught: Model) -> None:
    untrained = layerfold.compress(taught, Merge(n=2, align="none", tie=True))
    parameters = done.study.results().score("tied", "size")["parameters"]  # type: ignore[index]
    assert parameters == untrained.decoder.size().parameters < taught.decoder.size().parameters
    kept = [load(folder) for folder in (done.folder / "models").iterdir()]
    (tied,) = (model for model in kept if model.decoder.size().parameters == parameters and model.decoder.n_blocks == 4)
    one, two, *_ = (block.ffn.down.module.weight for block in tied.decoder.blocks)
    assert one is two


def test_running_again_trains_and_measures_nothing(done: Done, steps_taken: list[int], make: Make) -> None:
    files = {path: path.stat().st_mtime_ns for path in (done.folder / "records").iterdir()}
    assert run(make({"distill": DISTILL["distill"] | {"report_to": "all"}}, at=done.folder)) == []
    assert steps_taken == []
    assert {path: path.stat().st_mtime_ns for path in (done.folder / "records").iterdir()} == files


@pytest.mark.parametrize("changes", [{"freeze": ["*.wte.*"]}, {"tokens": 128}], ids=str)
def test_changed_settings_train_again_and_measure_nothing_of_before(
    done: Done, changes: dict[str, Any], steps_taken: list[int], make: Make
) -> None:
    changed = make({"distill": DISTILL["distill"] | changes}, variants=VARIANTS[:1], at=done.folder)
    assert run(changed) == [(label, name) for label in LABELS[:2] for name in (RECOVERY, "size", "perplexity")]
    assert len(steps_taken) == 2 * changes.get("tokens", 256) // 64
    assert "before" in changed.results().score("half", RECOVERY)  # type: ignore[operator]
    assert run(make(DISTILL, at=done.folder)) == [], "the records of both are kept"


def test_recovery_added_to_a_study_finds_its_before_measured(make: Make) -> None:
    one = {"variants": VARIANTS[:1]}
    first = run(make(None, **one))
    assert Counter(first) == Counter((label, name) for label in (BASE_LABEL, "half") for name in ("size", "perplexity"))
    added = run(make(**one))
    assert added == [(label, name) for label in (BASE_LABEL, "half") for name in (RECOVERY, "size", "perplexity")]
    without = make(None, **one)
    assert run(without) == []
    assert without.results().evaluators == ("size", "perplexity")


def test_without_recovery_a_record_is_named_by_what_it_always_was(taught: Model, make: Make) -> None:
    study = make(None)
    records = {(record.label, record.evaluator): record for record in study.run()}
    size = records["tied", "size"]
    subject = {
        "base_sha256": taught.sha256,
        "method": {"name": "merge", "groups": "0-1,2-3", "align": "none", "anchor": "first", "tie": True},
        "calibration": None,
        "seed": None,
        "versions": {"merge": 2},
        "evaluator": "size",
        "protocol": size.protocol,
        "settings": size.subject["settings"],
    }
    assert size.subject == subject
    assert size.key == hash_json(subject)
    assert records[BASE_LABEL, "perplexity"].subject["method"] is None
    assert all(record.subject.keys() | {"versions"} == subject.keys() for record in records.values())


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Callable[[], None]]:
    """Kill at the n-th step that any training takes; what is returned takes that back."""

    def at(count: int) -> Callable[[], None]:
        left, original = [count], callbacks.Bar.on_step_end

        def on_step_end(self: Any, *_: Any, **__: Any) -> None:
            left[0] -= 1
            if not left[0]:
                raise runs.Killed

        monkeypatch.setattr(callbacks.Bar, "on_step_end", on_step_end)
        return lambda: monkeypatch.setattr(callbacks.Bar, "on_step_end", original)

    return at


def figures(study: Study) -> list[Any]:
    results = study.results()
    found = []
    for label in study.labels:
        scores = {name: dict(results.score(label, name) or {}) for name in results.evaluators}
        scores[RECOVERY].pop("seconds")
        found.append(scores)
    return found


def test_a_study_killed_in_the_midst_of_training_goes_on_from_there(
    taught: Model, tmp_path: Path, steps_taken: list[int], kill: Any, train: Train
) -> None:
    search = {"distill": DISTILL["distill"] | {"learning_rate": None, "search_fraction": 0.5, "evaluations": 2}}
    wanted = recipe(train.corpus, search, variants=VARIANTS[:1])
    whole = Study(wanted, tmp_path / "whole", base=taught)
    run(whole)
    trials = [len(whole.results().score(label, RECOVERY)["learning_rates"]) for label in whole.labels]  # type: ignore[index]
    # The base's search and training, the variant's search, three steps.
    unkill = kill(2 * trials[0] + 4 + 2 * trials[1] + 3)
    done: list[Record] = []
    with pytest.raises(runs.Killed):
        done.extend(Study(wanted, tmp_path / "run", base=taught).run())
    assert [record.evaluator for record in done] == ["perplexity", RECOVERY, "size", "perplexity", "perplexity"]
    unkill()
    steps_taken.clear()
    again = Study(wanted, tmp_path / "run", base=taught)
    assert run(again) == [("half", name) for name in (RECOVERY, "size", "perplexity")]
    assert steps_taken == [3, 4], "neither the search nor what a checkpoint holds"
    assert figures(again) == figures(whole)
    assert not list((tmp_path / "run").glob("training/*"))


@pytest.fixture(scope="session")
def short(_taught: Model, study_corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study of the base alone, trained for a step."""
    settings = FINETUNE["finetune"] | {"tokens": 64, "evaluations": 1}
    wanted = recipe(study_corpus, {"finetune": settings}, variants=[])
    study = Study(wanted, tmp_path_factory.mktemp("short") / "run", base=_taught.copy())
    run(study)
    return study


@pytest.mark.parametrize("gone", [False, True], ids=["damaged", "missing"])
@pytest.mark.parametrize("name", ["config.json", "layerfold.json", "layerfold.safetensors", "tokenizer.json"])
def test_a_kept_model_that_was_damaged_is_trained_again(
    name: str, gone: bool, short: Study, taught: Model, tmp_path: Path, steps_taken: list[int]
) -> None:
    output = shutil.copytree(short.output_dir, tmp_path / "run")
    (folder,) = (output / "models").iterdir()
    path = folder / name
    if gone:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-9])
    records = output / "records"
    after = [record for record in records.iterdir() if RECOVERY in json.loads(record.read_text())["subject"]]
    assert len(after) == 3
    for record in after:
        record.unlink()
    again = Study(short.recipe, output, base=taught)
    assert run(again) == [(BASE_LABEL, each) for each in (RECOVERY, "size", "perplexity")]
    assert steps_taken == [1]
    assert figures(again) == figures(short)
    steps_taken.clear()
    next(records.glob("size-*")).unlink()
    assert run(Study(short.recipe, output, base=taught)) == [(BASE_LABEL, "size")]
    assert steps_taken == [], "what was written in its place is whole"


# Variants that somebody else made


def loading(folder: Path) -> list[dict[str, Any]]:
    return [{"label": "theirs", "load": str(folder)}]


def test_a_variant_that_is_loaded_is_known_by_its_weights(taught: Model, tmp_path: Path, train: Train) -> None:
    runs.small(seed=1).save(tmp_path / "theirs")
    wanted = recipe(train.corpus, None, variants=loading(tmp_path / "theirs"))
    study = Study(wanted, tmp_path / "run", base=taught)
    records = {(record.label, record.evaluator): record for record in study.run()}
    method = records["theirs", "size"].subject["method"]
    assert method == {
        "name": "load",
        "model": str(tmp_path / "theirs"),
        "revision": None,
        "sha256": load(tmp_path / "theirs").sha256,
        "dtype": "float32",
    }
    assert study.results().score("theirs", "size")["blocks"] == 2  # type: ignore[index]
    assert run(Study(wanted, tmp_path / "run", base=taught)) == []
    runs.small(seed=2).save(tmp_path / "theirs", overwrite=True)
    again = run(Study(wanted, tmp_path / "run", base=taught))
    assert Counter(again) == Counter([("theirs", "size"), ("theirs", "perplexity")])


def test_a_variant_that_is_loaded_is_trained_like_the_others(tmp_path: Path, make: Make) -> None:
    runs.small(seed=1).save(tmp_path / "theirs")
    study = make(DISTILL, variants=loading(tmp_path / "theirs"))
    done = run(study)
    assert [name for label, name in done if label == "theirs"] == ["perplexity", RECOVERY, "size", "perplexity"]
    score = study.results().score("theirs", "perplexity")
    assert score is not None
    assert score["value"] < study.results().score("theirs", RECOVERY)["before"]["value"]  # type: ignore[index]
    assert "versus_base" in score
    assert load(tmp_path / "theirs").sha256 == load(tmp_path / "theirs").provenance.base_sha256, "left as it was"


@pytest.mark.parametrize("changes", [{"vocab_size": VOCABULARY + 5}, {"n_positions": 8}], ids=str)
def test_a_variant_that_the_base_cannot_teach_is_named(changes: dict[str, Any], tmp_path: Path, make: Make) -> None:
    runs.small(**changes).save(tmp_path / "theirs")
    with refused(InputError, r"variant 'theirs': .*(vocabulary|context)"):
        run(make(DISTILL, variants=loading(tmp_path / "theirs"), evaluate=["size"]))


def test_a_variant_without_a_tokenizer_is_named(tmp_path: Path, make: Make) -> None:
    runs.small().decoder.model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(LayerfoldError, match=r"variant 'theirs': .*no tokenizer"):
        run(make(variants=loading(tmp_path / "theirs"), evaluate=["size"]))


def test_all_rows_are_trained_on_the_same_text(
    taught: Model, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: Train
) -> None:
    # Which is the base's where the recipe names none, and is held against the text that is scored.
    other = str(write("other.txt", "\n\n".join(prose(30, seed) for seed in range(100, 160))))
    runs.small().save(tmp_path / "theirs")

    def fitting(model: Model) -> str:
        return train.corpus if model.provenance.base == "taught" else other

    for module in ("study.recipe", "recovery.text", "evaluators.perplexity"):
        monkeypatch.setattr(f"layerfold.{module}.default_corpus", fitting)
    document = {"variants": loading(tmp_path / "theirs"), "evaluate": ["size"], "recovery": FINETUNE}
    run(Study(read_recipe(document), tmp_path / "run", base=taught))
    methods = [load(folder).provenance.steps[-1]["method"] for folder in (tmp_path / "run" / "models").iterdir()]
    assert len(methods) == 2
    assert len({method["tokens_sha256"] for method in methods}) == 1


def test_a_training_that_diverges_names_its_variant(make: Make) -> None:
    wild = {"finetune": FINETUNE["finetune"] | {"learning_rate": 1e5, "clip": 1e9, "warmup": 0.0}}
    with pytest.raises(TrainingError, match=r"variant 'base': training diverged at learning rate 100000"):
        run(make(wild))


def test_a_training_begun_otherwise_does_not_stand_in_the_way(
    taught: Model, tmp_path: Path, kill: Any, train: Train
) -> None:
    # The folder is the study's own; another machine's rounding makes other weights.
    wanted = recipe(train.corpus, variants=[], evaluate=["size"])
    unkill = kill(3)
    with pytest.raises(runs.Killed):
        run(Study(wanted, tmp_path / "run", base=taught))
    unkill()
    (settings,) = (tmp_path / "run" / "training").glob("*/recovery.json")
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_sha256": "other"}))
    assert (BASE_LABEL, RECOVERY) in run(Study(wanted, tmp_path / "run", base=taught))


# Text that is scored is not trained on


@pytest.mark.parametrize("split", ["train", "validation"])
def test_training_text_in_the_text_that_is_scored_is_named(
    split: str, taught: Model, write: Write, tmp_path: Path, steps_taken: list[int]
) -> None:
    corpus, scored = runs.shared_text(write, split)
    evaluate = [{"perplexity": {"corpus": scored}}]
    with pytest.raises(CorpusError, match=rf"1 documents stand in both .*one' {split} and .*'{runs.LINE[:40]}'"):
        run(Study(recipe(corpus, evaluate=evaluate), tmp_path / "run", base=taught))
    assert steps_taken == []
    assert not (tmp_path / "run").exists()
    without = recipe(corpus, None, evaluate=evaluate, variants=[])
    assert run(Study(without, tmp_path / "run", base=taught)) == [(BASE_LABEL, "perplexity")]


def test_a_score_on_the_text_that_chose_the_weights_is_refused(train: Train, make: Make) -> None:
    with pytest.raises(CorpusError, match=r"documents stand in both .* validation and .* validation"):
        run(make(evaluate=[{"perplexity": {"corpus": train.corpus, "split": "validation"}}]))


def test_a_comparison_is_of_trained_models(taught: Model, tmp_path: Path, train: Train) -> None:
    latency = {"latency": {"rounds": 3, "prompt_tokens": 4, "new_tokens": 2}}
    wanted = recipe(train.corpus, evaluate=["size", latency], variants=VARIANTS[:1])
    study = Study(wanted, tmp_path / "run", base=taught)
    done = run(study)
    assert Counter(done) == Counter(
        (label, name) for label in (BASE_LABEL, "half") for name in (RECOVERY, "size", "latency")
    )
    assert run(Study(wanted, tmp_path / "run", base=taught)) == []
    assert "speedup" in study.results().score("half", "latency")  # type: ignore[operator]


def test_rows_without_deltas_stay_as_they_are_where_deltas_are_trained(tmp_path: Path, train: Train) -> None:
    share = {"window": "1:2", "rank": 2, "align": "none", "init": "svd", "base": "mean"}
    variants = [{"label": "shared", "share": share}, *VARIANTS]
    found = recipe(train.corpus, {"lowrank": FINETUNE["finetune"]}, variants=variants)
    study = Study(found, tmp_path / "run", base=runs.small(n_layer=4))
    run(study)
    results = study.results()
    for label in study.labels:
        done = results.records[label, RECOVERY].score
        trained = label == "shared"
        assert (done["tokens"], done["parameters_trained"]) == ((256, 2 * 2 * 2 * (16 + 64)) if trained else (0, 0))
        after = results.records[label, "perplexity"].score["value"]
        assert (after == done["before"]["value"]) == (not trained)
    assert run(study) == []
