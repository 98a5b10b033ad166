"""Studies: what is measured once, what again, what survives being killed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import prose, tiny

from layerfold.checkpoint.model import Model
from layerfold.errors import CorpusError, InputError, OutputError
from layerfold.evaluators import Latency, Perplexity, Size
from layerfold.methods import Merge
from layerfold.records import BASE_LABEL, Record
from layerfold.report.columns import columns
from layerfold.report.study import table
from layerfold.study.recipe import Recipe, read_recipe
from layerfold.study.study import Study
from layerfold.text.corpora import load_corpus


def recipe(corpus: str, **changes: Any) -> Recipe:
    return read_recipe(
        {
            "variants": [
                {"label": "merged_2", "merge": {"n": 2}},
                {"label": "compressed_2", "collapse": {"n": 2}},
            ],
            "evaluate": [
                "size",
                {"perplexity": {"corpus": corpus}},
                {"latency": {"rounds": 3, "prompt_tokens": 4, "new_tokens": 2}},
                {"generation": {"prompts": ["the river"], "new_tokens": 5}},
            ],
            "calibration": {"corpus": corpus, "tokens": 512},
        }
        | changes
    )


@pytest.fixture(scope="module")
def base() -> Model:
    return tiny("gpt2")


def run(study: Study) -> list[tuple[str, str]]:
    return [(record.label, record.evaluator) for record in study.run()]


@pytest.fixture(scope="module")
def whole(base: Model, study_corpus: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Any]:
    """A study that ran to its end, and what it measured."""
    study = Study(recipe(study_corpus), tmp_path_factory.mktemp("whole") / "run", base=base)
    return study, run(study)


@pytest.fixture
def done(whole: tuple[Study, Any], tmp_path: Path) -> Path:
    """A copy of its folder."""
    return Path(shutil.copytree(whole[0].output_dir, tmp_path / "run"))


def figures(study: Study) -> list[Any]:
    results = study.results()
    return [results.score(label, kind) for label in results.labels for kind in ("size", "perplexity", "generation")]


def test_a_study_measures_every_variant_and_the_base(base: Model, whole: tuple[Study, Any]) -> None:
    study, done = whole
    names = ("size", "perplexity", "latency", "generation")
    assert sorted(done) == sorted((label, name) for label in (BASE_LABEL, "merged_2", "compressed_2") for name in names)
    results = study.results()
    assert results.labels == (BASE_LABEL, "merged_2", "compressed_2")
    assert [results.score(label, "size")["blocks"] for label in results.labels] == [4, 4, 2]
    merged = results.score("merged_2", "perplexity")
    ratio = merged["value"] / results.score(BASE_LABEL, "perplexity")["value"]
    assert merged["versus_base"]["value"] == pytest.approx(ratio)
    assert merged["versus_base"]["low"] <= ratio <= merged["versus_base"]["high"]
    assert "versus_base" not in results.score(BASE_LABEL, "perplexity")
    assert "speedup" in results.score("compressed_2", "latency")
    timed = results.score(BASE_LABEL, "latency")
    assert timed["speedup"] == timed["same_model"]  # of a copy of the base
    assert json.loads(json.dumps(results.to_json()))["variants"][1]["notes"]["pairs"][0]["anchor"] == 0
    assert Model(base.decoder, base.tokenizer, base.provenance).sha256 == tiny("gpt2").sha256, "it is left as it was"


def test_running_again_measures_nothing_and_changes_no_file(base: Model, study_corpus: str, done: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (done / "records").iterdir()}
    assert run(Study(recipe(study_corpus), done, base=base)) == []
    assert {path: path.stat().st_mtime_ns for path in (done / "records").iterdir()} == before


MERGED, COLLAPSED = ({"label": "merged_2", "merge": {"n": 2}}, {"label": "compressed_2", "collapse": {"n": 2}})


@pytest.mark.parametrize(
    ("changes", "measured"),
    [
        ({"variants": [MERGED, COLLAPSED, {"label": "new", "collapse": {"n": 4}}]}, {"new"}),
        ({"variants": [{"label": "renamed", "merge": {"groups": "0-1,2-3"}}]}, set()),
        ({"seed": 1}, {"merged_2", "compressed_2"}),
        ({"variants": [{"label": "merged_2", "merge": {"n": 2, "align": "none"}}]}, {"merged_2"}),
    ],
    ids=["a variant added", "the same by another name", "another seed", "another setting"],
)
def test_a_changed_recipe_measures_what_the_change_touches(
    base: Model, study_corpus: str, done: Path, changes: dict[str, Any], measured: set[str]
) -> None:
    again = run(Study(recipe(study_corpus, **changes), done, base=base))
    assert {label for label, _ in again} == measured
    assert len(again) == 4 * len(measured)


def test_a_method_of_another_version_is_measured_anew_and_no_other(
    base: Model, study_corpus: str, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Merge, "version", Merge.version + 1)
    assert {label for label, _ in run(Study(recipe(study_corpus), done, base=base))} == {"merged_2"}


def test_a_changed_evaluator_and_a_damaged_record_are_measured_again_alone(
    base: Model, study_corpus: str, done: Path
) -> None:
    damaged = next((done / "records").glob("size-*.json"))
    damaged.write_text(damaged.read_text()[:40])
    assert len(run(Study(recipe(study_corpus), done, base=base))) == 1
    evaluate = ["size", {"perplexity": {"corpus": study_corpus, "context": 16}}]
    assert {name for _, name in run(Study(recipe(study_corpus, evaluate=evaluate), done, base=base))} == {"perplexity"}


def test_another_base_shares_no_record(study_corpus: str, done: Path) -> None:
    assert len(run(Study(recipe(study_corpus, evaluate=["size"]), done, base=tiny("gpt2", seed=1)))) == 3


def test_stopping_between_records_loses_and_repeats_none_and_gives_the_same_numbers(
    base: Model, study_corpus: str, whole: tuple[Study, Any], tmp_path: Path
) -> None:
    done: list[Record] = []
    for record in Study(recipe(study_corpus), tmp_path / "run", base=base).run():
        done.append(record)
        if len(done) == 4:
            break
    again = Study(recipe(study_corpus), tmp_path / "run", base=base)
    rest = list(again.run())
    assert len(done) + len(rest) == len(whole[1])
    assert not {record.key for record in done} & {record.key for record in rest}
    assert figures(again) == figures(whole[0])


def test_a_killed_process_loses_no_finished_record(
    base: Model, study_corpus: str, tmp_path: Path, layerfold: Any, killed: Any
) -> None:
    model, folder, source = tmp_path / "model", tmp_path / "run", tmp_path / "recipe.yaml"
    base.save(model)
    source.write_text(json.dumps(recipe(study_corpus, base=str(model)).to_json()))
    killed(lambda: layerfold("study", source, "--output-dir", folder), "os.replace", 3, of="records/")
    kept = {path.name: path.read_bytes() for path in folder.glob("records/[!.]*.json")}
    assert len(kept) == 2
    for content in kept.values():
        json.loads(content)
    study = Study(read_recipe(source), folder)
    again = list(study.run())
    assert len(again) + len(kept) == 12
    for name, content in kept.items():
        assert (folder / "records" / name).read_bytes() == content
    assert len(study.results().records) == 12


def test_calibration_text_in_the_test_text_is_an_error(base: Model, write: Any, tmp_path: Path) -> None:
    first = write("one.txt", "\n\n".join(prose(40, seed) for seed in range(60)))
    shared = load_corpus(str(first), "calibration").documents[0]
    second = write("two/test.txt", "\n\n".join([shared.strip(), "another text"])).parent
    overlapping = recipe(str(first), evaluate=[{"perplexity": {"corpus": str(second)}}])
    with pytest.raises(CorpusError, match="1 documents stand in both"):
        run(Study(overlapping, tmp_path / "run", base=base))


def test_a_folder_of_something_else_is_refused_and_left_alone(base: Model, study_corpus: str, write: Any) -> None:
    kept = write("mine/notes.txt", "mine")
    with pytest.raises(OutputError, match="something other than such a run"):
        Study(recipe(study_corpus), kept.parent, base=base)
    run(Study(recipe(study_corpus, evaluate=["size"]), kept.parent, base=base, overwrite=True))
    assert kept.read_text() == "mine"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"merge": {"n": 9}}, r"n 9.*2 \.\.\. 4"),
        ({"share": {"k": 9}}, "k 9 for a model of .*; accepted: 2"),
        ({"share": {"k": 2, "rank": 33}}, r"rank 33; accepted: 0 \.\.\. 32"),
        ({"share": {"window": "3:2"}}, "window '3:2' ends at block 4"),
    ],
    ids=str,
)
def test_what_the_base_does_not_admit_names_its_variant_before_anything_is_measured(
    base: Model, study_corpus: str, tmp_path: Path, row: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=f"^variant 'wide': .*{said}") as caught:
        Study(recipe(study_corpus, variants=[{"label": "wide", **row}]), tmp_path / "run", base=base)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_rows_that_share_are_timed_multiplied_out_too(base: Model, study_corpus: str, tmp_path: Path) -> None:
    variants = [
        {"label": "merged_2", "merge": {"n": 2}},
        {"label": "named", "share": {"window": "1:2", "rank": 2}},
        {"label": "searched", "share": {"k": 2, "rank": 2}},
    ]
    document = recipe(study_corpus, variants=variants)
    study = Study(document, tmp_path / "run", base=base)
    assert len(run(study)) == 4 * 4
    results = study.results()
    for label in results.labels:
        found = {key for key in results.score(label, "latency") if "multiplied" in key}
        assert bool(found) == (label in ("named", "searched"))
    assert {"multiplied_out_ms", "multiplied_out_speedup"} <= {each.name for each in table(results).columns}
    notes = {each["label"]: each["notes"] for each in results.to_json()["variants"]}
    scored = notes["searched"]["search"]["perplexity"]
    assert list(scored) == ["0:2", "1:2", "2:2"]
    assert next(iter(notes["searched"]["ranks"])).startswith(f"transformer.h.{min(scored, key=scored.get)[0]}.")
    assert set(notes["named"]["ranks"].values()) == {2}
    assert run(Study(document, tmp_path / "run", base=base)) == []
    fewer = study.recipe.model_copy(update={"variants": study.recipe.variants[:1]})
    plain = Study(fewer, tmp_path / "run", base=base)
    assert run(plain) == []
    assert not [each.name for each in columns(plain.results()) if "multiplied" in each.name]


def test_evaluators_of_a_recipe_are_what_it_says(study_corpus: str) -> None:
    size, perplexity, latency, _ = recipe(study_corpus).evaluate
    assert size == Size()
    assert perplexity == Perplexity(corpus=study_corpus)
    assert latency == Latency(rounds=3, prompt_tokens=4, new_tokens=2)
