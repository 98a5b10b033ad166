"""`layerfold search` and what it feeds, as typed."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from tiny import BLOCKS

from layerfold.checkpoint.load import load
from layerfold.evaluators import Perplexity
from layerfold.inference.scoring import target_logits

pytestmark = pytest.mark.usefixtures("offline")


PLAIN = ("--init", "svd", "--align", "none", "--base", "anchor")


@pytest.fixture
def search(layerfold: Any, model: Path, study_corpus: str, tmp_path: Path) -> Any:
    """Search the checkpoint of four blocks, on little text."""

    def search(kind: str, *words: object, out: str = "found") -> Any:
        few = ("--corpus", study_corpus, "--tokens", 200, "--test-tokens", 150, "--output-dir", tmp_path / out)
        calibration = ("--calibration-tokens", 512) if kind == "window" else ()
        return layerfold("search", kind, "--model", model, *few, *calibration, *words)

    return search


@pytest.mark.parametrize(
    ("words", "candidates", "settings"),
    [
        (
            ("drop", "--remove", "1..2", "--rounds", 3),
            [[0], [1], [2], [3], [0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]],
            {"remove": [1, 2]},
        ),
        (("window", "--k", "2..3", "--rank", 2), [[0, 1], [1, 2], [2, 3], [0, 1, 2], [1, 2, 3]], {"k": [2, 3]}),
    ],
    ids=["drop", "window"],
)
def test_the_document_is_printed_and_written(
    search: Any, tmp_path: Path, words: tuple[object, ...], candidates: list[list[int]], settings: dict[str, Any]
) -> None:
    done = search(*words, "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document == json.loads((tmp_path / "found" / "search.json").read_text())
    assert document["search"] == words[0]
    changed = {"drop": "removed", "window": "blocks"}[document["search"]]
    assert [row[changed] for row in document["candidates"]] == candidates
    assert document["settings"].items() >= settings.items()
    assert (document["text"]["split"], document["eliminated"]) == ("validation", 0)
    assert document["base"]["perplexity"] > 1
    for count, best in document["best"].items():
        alike = [row for row in document["candidates"] if len(row[changed]) == int(count)]
        assert best["perplexity"] == min(row["perplexity"] for row in alike)
        assert best["test"]["perplexity"]["low"] < best["test"]["perplexity"]["value"]
        assert best["parameters"] < document["base"]["parameters"]
        assert best["parameters_change_percent"] < 0
    if document["search"] == "drop":
        assert {row["blocks"] for row in document["candidates"]} == {2, 3}
        assert document["base"]["milliseconds"] > 0
    else:
        assert [row["window"] for row in document["candidates"]] == ["0:2", "1:2", "2:2", "0:3", "1:3"]
        assert document["settings"]["share"]["rank"] == 2


@pytest.mark.parametrize(
    ("words", "said", "names"),
    [
        (("drop", "--rounds", 0), "chosen on", ["none", "0", "1", "2", "3"]),
        (
            ("window", "--k", 3, "--rank", 2, *PLAIN),
            "shared with rank 2, base anchor, init svd, ranks uniform, align none, anchor first",
            ["none", "0:3", "1:3"],
        ),
    ],
    ids=["drop", "window"],
)
def test_tables_and_files(search: Any, tmp_path: Path, words: tuple[object, ...], said: str, names: list[str]) -> None:
    done = search(*words)
    assert done.code == 0, done.err
    assert "chosen on" in done.out
    assert said in " ".join(done.out.split())
    assert ("0:3 (0–2)" in done.out) == (words[0] == "window")
    assert str(tmp_path / "found" / "report.html") in done.out
    rows = list(csv.DictReader((tmp_path / "found" / "candidates.csv").read_text().splitlines()))
    assert [next(iter(row.values())) for row in rows] == names
    assert words[0] == "drop" or [(row["start"], row["k"]) for row in rows] == [("", ""), ("0", "3"), ("1", "3")]
    assert "<html" in (tmp_path / "found" / "report.html").read_text()


def test_the_best_of_a_search_is_dropped(search: Any, layerfold: Any, model: Path, tmp_path: Path) -> None:
    document = json.loads(search("drop", "--all", "--rounds", 0, "--json").out)
    file, out = tmp_path / "found" / "search.json", tmp_path / "out"
    done = layerfold("compress", "drop", "--model", model, "--from-search", file, "--remove", 3, "--output-dir", out)
    assert done.code == 0, done.err
    gone = document["best"]["3"]["removed"]
    assert f"dropped blocks {','.join(map(str, gone))}" in done.out
    kept = [i for i in range(BLOCKS) if i not in gone]
    assert load(out).provenance.steps[-1]["kept_blocks"] == kept
    assert load(out).decoder.size().parameters == document["best"]["3"]["parameters"]


def test_the_best_after_a_repair(search: Any, layerfold: Any, model: Path, study_corpus: str, tmp_path: Path) -> None:
    few = ("--finalists", 2, "--calibration-tokens", 300, "--rounds", 0, "--remove", "1..2")
    words: tuple[object, ...] = ("drop", "--objective", "repaired", *few)
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


def test_the_window_found_is_what_compress_shares(
    search: Any, layerfold: Any, model: Path, study_corpus: str, tmp_path: Path
) -> None:
    document = json.loads(search("window", "--k", 2, "--rank", 2, "--tokens", 65536, "--json").out)
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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("drop", "--objective", "repaired", "--part", "ffn"), "objective 'repaired' with part 'ffn'; accepted: block"),
        (("drop", "--remove", "two"), "--remove 'two'; accepted: how many, as 2 or 1..3"),
        (("drop", "--remove", "1..999999"), "remove 1..999999 for a model of depth 4; accepted: 1 ... 3"),
        (("drop", "--remove", ""), "--remove ''; accepted: how many, as 2 or 1..3"),
        (("drop", "--context", "1"), "context 1: at least 2 tokens are needed"),
        (("drop", "--corpus", "/nowhere/x.txt"), "no file or folder at '/nowhere/x.txt'"),
        (("drop", "--output-dir", "x" * 300), "File name too long"),
        (("window", "--k", "two"), "--k 'two'; accepted: how many, as 2 or 1..3"),
        (("window", "--corpus", "/nowhere/x.txt"), "no file or folder at '/nowhere/x.txt'"),
        (("window", "--output-dir", "x" * 300), "File name too long"),
        (("window", "--objective", "perplexty"), "perplexity"),
    ],
)
def test_what_is_refused(search: Any, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    done = search(*words)
    assert done.code == 2
    assert done.err.strip().splitlines()[-1].startswith("layerfold: ")
    assert said in done.err
    assert not (tmp_path / "found" / "search.json").exists()


def test_a_folder_of_something_else_is_written_into_with_overwrite(search: Any, tmp_path: Path) -> None:
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "thesis.txt").write_text("mine")
    done = search("window", "--k", 2, *PLAIN)
    assert done.code == 2
    assert "holds something other than such a run" in done.err
    assert search("window", "--k", 2, *PLAIN, "--overwrite").code == 0
    assert (tmp_path / "found" / "thesis.txt").read_text() == "mine"


def test_a_killed_search_goes_on_and_finds_the_same(
    search: Any, tmp_path: Path, killed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("drop", "--all", "--rounds", 0, "--json")
    with monkeypatch.context() as patch:
        patch.setattr("layerfold.search.scores._SAVE_SECONDS", 0)
        killed(lambda: search(*words, out="killed"), "os.replace", 3, of="scores-")
    assert list((tmp_path / "killed").glob("scores-*"))
    assert not (tmp_path / "killed" / "search.json").exists()
    scored: list[Any] = []
    monkeypatch.setattr(
        "layerfold.search.scores.target_logits", lambda *given: scored.append(given) or target_logits(*given)
    )
    resumed, again = search(*words, out="killed"), len(scored)
    whole = search(*words, out="whole")
    assert 0 < again < len(scored) - again
    candidates = (json.loads(done.out)["candidates"] for done in (resumed, whole))
    for one, two in zip(*candidates, strict=True):
        assert one["removed"] == two["removed"]
        assert one["perplexity"] == pytest.approx(two["perplexity"], rel=1e-5)
