"""`layerfold report`: a study's report made again, and beside the published figures."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from layerfold.checkpoint import load
from layerfold.records import RESULTS_FILE, read_results
from layerfold.study import study

FILES = ("results.csv", "report.html")


@pytest.fixture
def make_run(layerfold: Any, model: Path, study_corpus: str, tmp_path: Path) -> Any:
    """Run a study of a tiny model; return its folder and what it printed."""

    def make(name: str = "run", variants: Any = None, evaluate: Any = None) -> tuple[Path, Any]:
        document = {
            "base": str(model),
            "variants": variants or [{"label": "compressed_2", "collapse": {"n": 2}}],
            "evaluate": evaluate or ["size", {"perplexity": {"corpus": study_corpus}}],
            "calibration": {"corpus": study_corpus, "tokens": 256},
        }
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump(document))
        done = layerfold("study", recipe, "--output-dir", tmp_path / name)
        assert done.code == 0, done.err
        return tmp_path / name, done

    return make


@pytest.fixture
def without_models(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Forbid loading models and running studies from now on."""

    def forbid() -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise AssertionError("a report needs no model")

        monkeypatch.setattr(load, "load", refuse)
        monkeypatch.setattr(study, "Study", refuse)

    return forbid


def test_the_report_is_made_again_from_what_a_study_leaves(layerfold: Any, make_run: Any, without_models: Any) -> None:
    folder, told = make_run()
    results = read_results(folder)
    assert results.labels == ("base", "compressed_2")
    assert results.evaluators == ("size", "perplexity")
    stored = {path.name for path in (folder / "records").iterdir()}
    assert stored == {f"{record.evaluator}-{record.key[:24]}.json" for record in results.records.values()}
    assert results.score("compressed_2", "perplexity")["versus_base"]["value"] > 0  # type: ignore[index]
    before = {name: (folder / name).read_bytes() for name in FILES}
    for name in FILES:
        (folder / name).unlink()
    without_models()
    done = layerfold("report", folder)
    assert done.code == 0, done.err
    assert done.out.splitlines() == [line for line in told.out.splitlines() if not line.startswith("run: ")]
    assert {name: (folder / name).read_bytes() for name in FILES} == before
    assert not (folder / "published.csv").exists()
    # JSON is the study's and nothing else.
    document = json.loads(layerfold("report", folder, "--json").out)
    assert document == json.loads(json.dumps(results.to_json()))
    beside = json.loads(layerfold("report", folder, "--against", "published", "--json").out)
    assert beside.pop("published")[0]["rows"][0]["published_perplexity"] == 12.22
    assert beside == document


def test_published_figures_stand_beside_ours(layerfold: Any, make_run: Any) -> None:
    folder, _ = make_run()
    plain = layerfold("report", folder).out.rpartition("report: ")[0]
    page = (folder / "report.html").read_text(encoding="utf-8")
    done = layerfold("report", folder, "--against", "published")
    assert done.code == 0, done.err
    assert done.out.startswith(plain)
    assert "Published figures are of GPT-2" in done.out
    assert "18.93" in done.out.removeprefix(plain)
    assert done.out.endswith(f"published: {folder / 'published.csv'}\nreport: {folder / 'report.html'}\n")
    with open(folder / "published.csv", encoding="utf-8", newline="") as file:
        rows = {row["label"] or row["published_label"]: row for row in csv.DictReader(file)}
    results = read_results(folder)
    assert rows["compressed_2"]["published_perplexity"] == "18.93"
    ours = results.score("compressed_2", "perplexity")["value"]  # type: ignore[index]
    assert float(rows["compressed_2"]["ours_perplexity"]) == ours
    assert 'id="published-gpt2"' in (folder / "report.html").read_text(encoding="utf-8")
    layerfold("report", folder)
    assert (folder / "report.html").read_text(encoding="utf-8") == page
    # A run of an older version is completed by running the study again.
    (folder / RESULTS_FILE).unlink()
    done = layerfold("report", folder)
    assert (done.code, done.out) == (2, "")
    assert "unfinished or of an older version: run `layerfold study` with --output-dir" in done.err
    make_run()
    assert read_results(folder) == results


def test_what_is_refused_is_one_line_and_writes_nothing(layerfold: Any, make_run: Any, tmp_path: Path) -> None:
    folder, _ = make_run(variants=[{"label": "ours_alone", "drop": {"blocks": "1"}}])
    kept = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    (tmp_path / "empty").mkdir()
    for words, said in (
        (["report", folder, "--against", "publishd"], "--against 'publishd'; did you mean 'published'? accepted:"),
        (["report", folder, "--against", ""], "--against ''; accepted: published"),
        (["report", folder, "--against", "published"], "rows: ours_alone; measured: size, perplexity;"),
        (["report", tmp_path / "nowhere"], "no folder at"),
        (["report", tmp_path / "empty"], "is no run of `layerfold study`"),
    ):
        done = layerfold(*words)
        assert (done.code, done.out) == (2, "")
        assert said in done.err
        assert done.err.startswith("layerfold: ")
        assert done.err.count("\n") == 1
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == kept


def test_results_of_a_study_come_back_exactly(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    original = study.Study.results
    monkeypatch.setattr(study.Study, "results", lambda self: written.append(original(self)) or written[-1])
    evaluate = ["size", {"latency": {"rounds": 3, "prompt_tokens": 4, "new_tokens": 2}}]
    folder, _ = make_run(variants=[{"label": "drop_1", "drop": {"blocks": "1"}}], evaluate=evaluate)
    assert read_results(folder) == written[0]
