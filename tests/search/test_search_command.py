"""`layerfold search drop` and what it feeds, as typed."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny import BLOCKS, Write, prose, tiny
from torch import Tensor

from layerfold.checkpoint.load import load
from layerfold.evaluators import Perplexity
from layerfold.inference.scoring import target_logits

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture
def search(layerfold: Any, model: Path, study_corpus: str, tmp_path: Path) -> Any:
    """Search the checkpoint of four blocks, on little text."""

    def search(*words: object) -> Any:
        few = ("--corpus", study_corpus, "--tokens", 200, "--test-tokens", 150, "--output-dir", tmp_path / "found")
        return layerfold("search", "drop", "--model", model, *few, *words)

    return search


def test_the_document_is_printed_and_written(search: Any, tmp_path: Path) -> None:
    done = search("--remove", "1..2", "--rounds", 3, "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document == json.loads((tmp_path / "found" / "search.json").read_text())
    assert [row["removed"] for row in document["candidates"]][:5] == [[0], [1], [2], [3], [0, 1]]
    assert {row["blocks"] for row in document["candidates"]} == {2, 3}
    assert document["base"]["perplexity"] > 1
    assert document["base"]["milliseconds"] > 0
    for count, best in document["best"].items():
        alike = [row for row in document["candidates"] if len(row["removed"]) == int(count)]
        assert best["perplexity"] == min(row["perplexity"] for row in alike)
        assert best["test"]["perplexity"]["low"] < best["test"]["perplexity"]["value"]
        assert best["parameters"] < document["base"]["parameters"]
    assert document["text"]["split"] == "validation"
    assert document["settings"]["remove"] == [1, 2]


def test_tables_and_files(search: Any, tmp_path: Path) -> None:
    done = search("--rounds", 0)
    assert done.code == 0, done.err
    assert "chosen on" in done.out
    assert str(tmp_path / "found" / "report.html") in done.out
    rows = list(csv.DictReader((tmp_path / "found" / "candidates.csv").read_text().splitlines()))
    assert [row["removed"] for row in rows] == ["none", "0", "1", "2", "3"]
    assert "<html" in (tmp_path / "found" / "report.html").read_text()


def test_the_best_of_a_search_is_dropped(search: Any, layerfold: Any, model: Path, tmp_path: Path) -> None:
    document = json.loads(search("--all", "--rounds", 0, "--json").out)
    file, out = tmp_path / "found" / "search.json", tmp_path / "out"
    done = layerfold("compress", "drop", "--model", model, "--from-search", file, "--remove", 3, "--output-dir", out)
    assert done.code == 0, done.err
    gone = document["best"]["3"]["removed"]
    assert f"dropped blocks {','.join(map(str, gone))}" in done.out
    kept = [i for i in range(BLOCKS) if i not in gone]
    assert load(out).provenance.steps[-1]["kept_blocks"] == kept
    assert load(out).decoder.size().parameters == document["best"]["3"]["parameters"]


def test_the_best_after_a_repair(search: Any, layerfold: Any, model: Path, study_corpus: str, tmp_path: Path) -> None:
    words = (
        "--objective",
        "repaired",
        "--finalists",
        2,
        "--calibration-tokens",
        300,
        "--rounds",
        0,
        "--remove",
        "1..2",
    )
    done = search(*words, "--json")
    assert done.code == 0, done.err
    assert "NaN" not in done.out
    document = json.loads(done.out)
    assert document == json.loads((tmp_path / "found" / "search.json").read_text())
    assert [row["kl"] for row in document["best"].values()] == [None, None]
    assert (document["settings"]["finalists"], document["settings"]["calibration_tokens"]) == (2, 300)
    page = (tmp_path / "found" / "report.html").read_text()
    assert "the best of each number with a whole repair." in page
    assert ">nan<" not in page
    rows = list(csv.DictReader((tmp_path / "found" / "candidates.csv").read_text().splitlines()))
    assert sum(row["best"] == "true" for row in rows) == 3
    assert not any(figure == "nan" for row in rows for figure in row.values())
    again = search(*words)
    assert again.code == 0, again.err
    assert " nan " not in again.out
    assert "candidates are listed with each block repaired" in again.out
    file, out = tmp_path / "found" / "search.json", tmp_path / "out"
    words = ("--from-search", file, "--remove", 2, "--repair", "refit+attention", "--repair-tokens", 300)
    done = layerfold("compress", "drop", "--model", model, *words, "--corpus", study_corpus, "--output-dir", out)
    assert done.code == 0, done.err
    test = Perplexity(corpus=study_corpus, split="test", limit_tokens=150)(load(out))
    assert test.value == pytest.approx(document["best"]["2"]["test"]["perplexity"]["value"], rel=1e-5)
    bare = layerfold("compress", "drop", "--model", model, *words[:4], "--output-dir", tmp_path / "bare")
    assert bare.code == 2
    assert "tells what is best to drop before a repair, and none is to follow; accepted: repair refit+att" in bare.err
    assert not (tmp_path / "bare").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--objective", "repaired", "--part", "ffn"), "objective 'repaired' with part 'ffn'; accepted: block"),
        (("--objective", "repaired", "--finalists", "0"), "finalists 0; accepted: 1 or more"),
        (
            ("--objective", "repaired", "--calibration-tokens", "20"),
            "calibration text of 1 window; accepted: 2 or more",
        ),
        (("--remove", "2..1"), "remove 2..1; accepted: first..last with 1 <= first <= last"),
        (("--remove", "0"), "remove 0..0; accepted"),
        (("--remove", "4"), "remove 4..4 for a model of depth 4; accepted: 1 ... 3"),
        (("--remove", "two"), "--remove 'two'; accepted: how many, as 2 or 1..3"),
        (("--remove", "1..999999"), "remove 1..999999 for a model of depth 4; accepted: 1 ... 3"),
        (("--remove", ""), "--remove ''; accepted: how many, as 2 or 1..3"),
        (("--output-dir", "x" * 300), "File name too long"),
        (("--remove", "1-3"), "--remove '1-3'; accepted: how many, as 2 or 1..3"),
        (("--remove", "1", "--all"), "--remove 1 and --all; accepted: one of the two"),
        (("--rounds", "1"), "rounds 1; accepted: 0 (nothing is timed), or 3 or more"),
        (("--context", "1"), "context 1: at least 2 tokens are needed"),
        (("--width", "0"), "width 0; accepted: 1 or more"),
        (("--corpus", "/nowhere/x.txt"), "no file or folder at '/nowhere/x.txt'"),
    ],
)
def test_what_is_refused(search: Any, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    done = search(*words)
    assert done.code == 2
    assert done.err.strip().splitlines()[-1].startswith("layerfold: ")
    assert said in done.err
    assert not (tmp_path / "found" / "search.json").exists()


def test_a_search_of_another_model_is_refused(search: Any, layerfold: Any, tmp_path: Path) -> None:
    assert search("--rounds", 0).code == 0
    tiny("gpt2", seed=1).save(tmp_path / "other")
    file, out = tmp_path / "found" / "search.json", tmp_path / "out"
    done = layerfold("compress", "drop", "--model", tmp_path / "other", "--from-search", file, "--output-dir", out)
    assert done.code == 2
    assert "is of another model: weights" in done.err
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--remove", "1"), "--remove 1 without --from-search"),
        (("--from-search", "search.json", "--blocks", "1"), "--from-search, which says what to drop, beside --blocks"),
        (("--from-search", "search.json", "--part", "ffn"), "--from-search, which says what to drop, beside --blocks"),
        (("--from-search", "search.json"), "search file 'search.json' cannot be read (No such file or directory)"),
    ],
)
def test_ways_of_choosing_that_do_not_go_together(
    layerfold: Any, model: Path, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    done = layerfold("compress", "drop", "--model", model, *words, "--output-dir", tmp_path / "out")
    assert done.code == 2
    assert said in done.err
    assert not (tmp_path / "out").exists()


def test_a_killed_search_goes_on_and_finds_the_same(
    write: Write, tmp_path: Path, layerfold: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny("gpt2", n_layer=8).save(tmp_path / "deep")
    text = write("long/text.txt", "\n\n".join(prose(200, seed) for seed in range(100)))
    words = ["search", "drop", "--model", tmp_path / "deep", "--corpus", text, "--all", "--rounds", "0"]
    words += ["--tokens", "3000", "--test-tokens", "200", "--json"]
    script = (
        "import layerfold.search.scores as scores; scores._SAVE_SECONDS = 0.05\n"
        "import torch; torch.set_num_threads(1)\n"
        "from layerfold.cli import main; main()"
    )
    command = [sys.executable, "-c", script, *map(str, words), "--output-dir", str(tmp_path / "killed")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "killed").glob("scores-*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "search.json").exists()
    scored = {"killed": 0, "whole": 0}

    def searched(folder: str) -> Any:
        def counting(*arguments: Any) -> Tensor:
            scored[folder] += 1
            return target_logits(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr("layerfold.search.scores.target_logits", counting)
            return layerfold(*words, "--output-dir", tmp_path / folder)

    resumed = searched("killed")
    assert resumed.code == 0, resumed.err
    whole = json.loads(searched("whole").out)
    assert 0 < scored["killed"] < scored["whole"]
    for one, two in zip(json.loads(resumed.out)["candidates"], whole["candidates"], strict=True):
        assert one["removed"] == two["removed"]
        assert one["perplexity"] == pytest.approx(two["perplexity"], rel=1e-5)
