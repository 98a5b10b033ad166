"""`layerfold search window` and what shares the window it finds, as typed."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny

from layerfold.checkpoint.load import load

pytestmark = pytest.mark.usefixtures("offline")

PLAIN = ("--init", "svd", "--align", "none", "--base", "anchor")


@pytest.fixture
def search(layerfold: Any, model: Path, study_corpus: str, tmp_path: Path) -> Any:
    """Search the checkpoint of four blocks, on little text."""

    def search(*words: object, model: Path = model) -> Any:
        few = ("--corpus", study_corpus, "--tokens", 200, "--test-tokens", 150, "--calibration-tokens", 512)
        return layerfold("search", "window", "--model", model, *few, "--output-dir", tmp_path / "found", *words)

    return search


def test_the_document_is_printed_and_written(search: Any, tmp_path: Path) -> None:
    done = search("--k", "2..3", "--rank", 2, "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document == json.loads((tmp_path / "found" / "search.json").read_text())
    assert (document["search"], document["settings"]["k"], document["eliminated"]) == ("window", [2, 3], 0)
    assert [row["window"] for row in document["candidates"]] == ["0:2", "1:2", "2:2", "0:3", "1:3"]
    assert document["candidates"][3]["blocks"] == [0, 1, 2]
    assert document["settings"]["share"]["rank"] == 2
    for k, best in document["best"].items():
        alike = [row for row in document["candidates"] if len(row["blocks"]) == int(k)]
        assert best["perplexity"] == min(row["perplexity"] for row in alike)
        assert best["test"]["perplexity"]["low"] < best["test"]["perplexity"]["value"]
        assert best["parameters_change_percent"] < 0


def test_tables_and_files(search: Any, tmp_path: Path) -> None:
    done = search("--k", 3, "--rank", 2, *PLAIN)
    assert done.code == 0, done.err
    assert "0:3 (0–2)" in done.out
    assert "chosen on" in done.out
    words = " ".join(done.out.split())
    assert "shared with rank 2, base anchor, init svd, ranks uniform, align none, anchor first" in words
    assert str(tmp_path / "found" / "report.html") in done.out
    rows = list(csv.DictReader((tmp_path / "found" / "candidates.csv").read_text().splitlines()))
    assert [(row["window"], row["start"], row["k"]) for row in rows] == [
        *(("none", "", ""), ("0:3", "0", "3"), ("1:3", "1", "3")),
    ]
    assert "<html" in (tmp_path / "found" / "report.html").read_text()


def test_the_window_found_is_what_compress_shares(
    search: Any, layerfold: Any, model: Path, study_corpus: str, tmp_path: Path
) -> None:
    document = json.loads(search("--k", 2, "--rank", 2, "--tokens", 65536, "--json").out)
    words = ("--k", 2, "--rank", 2, "--corpus", study_corpus, "--tokens", 512, "--output-dir", tmp_path / "out")
    done = layerfold("compress", "share", "--model", model, *words)
    assert done.code == 0, done.err
    shared = load(tmp_path / "out")
    step = shared.provenance.steps[-1]
    assert step["method"]["window"] == document["best"]["2"]["window"]
    assert shared.decoder.size().parameters == document["best"]["2"]["parameters"]
    told = step["notes"]["search"]["perplexity"]
    for row in document["candidates"]:
        assert told[row["window"]] == pytest.approx(row["perplexity"], rel=1e-6)


def test_a_race_and_the_divergence(search: Any) -> None:
    done = search("--k", 2, "--race", "--objective", "kl", "--tokens", 2000, "--json", *PLAIN)
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document["eliminated"] + len(document["candidates"]) == 3
    assert document["best"]["2"]["kl"] == min(row["kl"] for row in document["candidates"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--k", "1"), "k 1..1; accepted: first..last with 2 <= first <= last"),
        (("--k", "3..2"), "k 3..2; accepted"),
        (("--k", "5"), "k 5 for a model of 4 blocks; accepted: 2 ... 4"),
        (("--k", "two"), "--k 'two'; accepted: how many, as 2 or 1..3"),
        (("--k", "2-3"), "--k '2-3'; accepted"),
        (("--k", ""), "--k ''; accepted"),
        (("--rank", "-1"), "rank -1; accepted: 0 or more"),
        (("--rank", "64"), "no window of 4 blocks can be shared: rank 64; accepted: 0 ... 32"),
        (("--context", "1"), "context 1: at least 2 tokens are needed"),
        (("--corpus", "/nowhere/x.txt"), "no file or folder at '/nowhere/x.txt'"),
        (("--output-dir", "x" * 300), "File name too long"),
    ],
)
def test_what_is_refused(search: Any, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    done = search(*words)
    assert done.code == 2
    assert done.err.strip().splitlines()[-1].startswith("layerfold: ")
    assert said in done.err
    assert not (tmp_path / "found" / "search.json").exists()


def test_an_objective_that_is_misspelt(search: Any) -> None:
    done = search("--objective", "perplexty")
    assert done.code == 2
    assert "perplexity" in done.err


def test_models_that_have_no_window(search: Any, tmp_path: Path) -> None:
    tiny("gpt2", n_layer=1).save(tmp_path / "one")
    done = search(model=tmp_path / "one")
    said = "layerfold: k 4 for a model of 1 block, which has none to share with"
    assert (done.code, done.err.strip().splitlines()[-1]) == (2, said)
    gaps = tiny("gpt2")
    gaps.decoder.remove_("ffn", (1, 2))
    gaps.save(tmp_path / "gaps")
    done = search("--k", 2, model=tmp_path / "gaps")
    assert done.code == 2
    assert done.err.strip().splitlines()[-1].startswith("layerfold: no window of 2 blocks can be shared: ")


def test_a_folder_of_something_else(search: Any, tmp_path: Path) -> None:
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "thesis.txt").write_text("mine")
    done = search("--k", 2, *PLAIN)
    assert done.code == 2
    assert "holds something other than such a run" in done.err
    assert [path.name for path in (tmp_path / "found").iterdir()] == ["thesis.txt"]
    assert search("--k", 2, *PLAIN, "--overwrite").code == 0
    assert (tmp_path / "found" / "thesis.txt").read_text() == "mine"
