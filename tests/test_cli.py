"""The commands, as typed: what they print, what they write, and how they refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import tiny, tiny_model

from layerfold import cli
from layerfold.hub import load

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("hub", "corpora", "doctor"):
        monkeypatch.setattr(f"layerfold.{module}.hub_reachable", lambda: False)


class Outcome:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def layerfold(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Run a command in this process and return its exit code and what it printed."""

    def run(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["layerfold", *map(str, words)])
        capfd.readouterr()
        code: int | str | None = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        captured = capfd.readouterr()
        return Outcome(int(code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny("gpt2").save(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("method", ["merge", "collapse"])
def test_compress_writes_what_plain_transformers_loads(
    layerfold: Any, model: Path, study_corpus: str, tmp_path: Path, method: str
) -> None:
    out = tmp_path / "out"
    done = layerfold("compress", method, "--model", model, "--n", 2, "--corpus", study_corpus, "--output-dir", out)
    assert done.code == 0, done.err
    assert "block  1 to  0: mean matched correlation" in done.out
    script = (
        "import sys, torch, transformers; assert 'layerfold' not in sys.modules;"
        f"m = transformers.AutoModelForCausalLM.from_pretrained({str(out)!r});"
        "print(m(torch.arange(8)[None]).logits.double().sum().item())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    plain = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    ours = load(out).decoder.model(torch.arange(8)[None]).logits.double().sum().item()
    assert float(plain.stdout) == pytest.approx(ours, rel=1e-6)
    step = json.loads((out / "layerfold.json").read_text())["provenance"]["steps"][0]
    assert step["method"]["groups"] == "0-1,2-3"
    assert step["calibration"]["split"] == "calibration"


def test_a_tied_merge_is_smaller_in_compact_form_and_exports_to_dense(
    layerfold: Any, model: Path, tmp_path: Path
) -> None:
    compact, dense = tmp_path / "compact", tmp_path / "dense"
    words = ("compress", "merge", "--model", model, "--n", 4, "--align", "none", "--tie")
    assert layerfold(*words, "--format", "compact", "--output-dir", compact).code == 0
    assert layerfold("export", compact, "--to", "dense", "--output-dir", dense).code == 0
    weights = (compact / "layerfold.safetensors").stat().st_size, (dense / "model.safetensors").stat().st_size
    assert weights[0] < 0.6 * weights[1]
    ids = torch.arange(8)[None]
    assert torch.equal(load(compact).decoder.model(ids).logits, load(dense).decoder.model(ids).logits)
    again = tmp_path / "again"
    assert layerfold("export", dense, "--to", "compact", "--output-dir", again).code == 0
    assert torch.equal(load(again).decoder.model(ids).logits, load(dense).decoder.model(ids).logits)


def test_eval_json_is_one_document_and_nothing_else(layerfold: Any, model: Path, study_corpus: str) -> None:
    done = layerfold("eval", model, "--corpus", study_corpus, "--metrics", "perplexity,size", "--json")
    assert done.code == 0, done.err
    scores = json.loads(done.out)
    assert list(scores) == ["perplexity", "size"]
    assert scores["perplexity"]["low"] < scores["perplexity"]["value"] < scores["perplexity"]["high"]
    assert {"tokens", "bits_per_byte", "context", "stride", "corpus", "split", "tokens_sha256"} <= set(
        scores["perplexity"]
    )
    assert {"parameters", "nonzero", "bytes", "flops_per_token"} <= set(scores["size"])


def test_eval_measures_all_four(layerfold: Any, tmp_path: Path, study_corpus: str) -> None:
    tiny("gpt2", n_positions=160).save(tmp_path / "long")  # the default prompts and lengths need some room
    done = layerfold("eval", tmp_path / "long", "--corpus", study_corpus, "--json")
    assert done.code == 0, done.err
    assert list(json.loads(done.out)) == ["perplexity", "size", "latency", "generation"]
    told = layerfold("eval", tmp_path / "long", "--corpus", study_corpus, "--metrics", "generation")
    assert told.out.count("\n  > ") == 8


def test_study_prints_a_table_and_leaves_a_page(layerfold: Any, model: Path, study_corpus: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    document = {
        "base": "pocket",
        "variants": [{"label": "compressed_2", "collapse": {"n": 2}}],
        "evaluate": ["size", {"perplexity": {"corpus": study_corpus}}],
        "calibration": {"corpus": study_corpus, "tokens": 256},
    }
    recipe.write_text(yaml.safe_dump(document))
    run = tmp_path / "run"
    words = ("study", recipe, "--model", model, "--output-dir", run)
    done = layerfold(*words)
    assert done.code == 0, done.err
    assert "compressed_2" in done.out
    assert done.out.rstrip().endswith(f"report: {run / 'report.html'}")
    assert {"results.csv", "report.html", "study.json", "records"} <= {path.name for path in run.iterdir()}
    told = layerfold(*words, "--json")
    assert [variant["label"] for variant in json.loads(told.out)["variants"]] == ["base", "compressed_2"]


def test_doctor_says_what_is_reachable(layerfold: Any) -> None:
    found = json.loads(layerfold("doctor", "--json").out)
    assert found["models"]["pocket"] == "embedded"
    assert found["models"]["Hub"].startswith("not reachable")
    assert found["speed"]["float32 GFLOP/s"] > 0
    assert "advice: float32" in layerfold("doctor").out


REFUSED = [
    (["compress", "merge", "--n", 1], "n 1; accepted: a whole number from 2"),
    (["compress", "merge", "--n", 0], "n 0; accepted"),
    (["compress", "collapse", "--n", -3], "n -3; accepted"),
    (["compress", "merge", "--n", 5], "n 5 for a model of 4 blocks; accepted: 2 ... 4"),
    (["compress", "merge"], "accepted: one of the two"),
    (["compress", "merge", "--n", 2, "--groups", "0-1"], "accepted: one of the two"),
    (["compress", "collapse", "--groups", "2-4"], "groups '2-4' for a model of blocks 0 ... 3"),
    (["compress", "collapse", "--groups", "2"], "group '2'; accepted: first-last"),
    (["compress", "merge", "--n", 2, "--corpus", "imbd"], "unknown corpus 'imbd'; did you mean 'imdb'?"),
    (["compress", "merge", "--n", 2, "--corpus", "wikitext/wikitext-2-raw-v1"], "the Hub cannot be reached"),
    (["compress", "merge", "--n", 2, "--corpus", "imdb", "--tokens", 0], "limit of 0 tokens; accepted: 2 or more"),
]


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_refused_compression_is_one_line_and_writes_nothing(
    layerfold: Any, model: Path, tmp_path: Path, words: list[object], said: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = layerfold(*words, "--model", model, "--output-dir", tmp_path / "out")
    assert (done.code, done.out) == (2, "")
    assert done.err.count("\n") == 1
    assert said in done.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval", "pokcet"], "did you mean 'pocket'?"),
        (["eval", "gpt2"], "the Hub cannot be reached"),
        (["eval", "pocket", "--metrics", "perplexty"], "did you mean 'perplexity'?"),
        (["eval", "pocket", "--metrics", ","], "no metrics; accepted"),
        (["eval", "pocket", "--split", "tset"], "did you mean 'test'?"),
        (["eval", "pocket", "--corpus", "./none.txt"], "no file or folder"),
        (["export", "none", "--to", "dense", "--output-dir", "out"], "no checkpoint folder"),
        (["study", "none.yaml"], "cannot be read"),
        (["compress", "merge", "--n", "two", "--output-dir", "out"], "--n"),
        (["compress", "merge", "--align", "best", "--output-dir", "out"], "hungarian"),
        (["compress", "fold"], "fold"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_input_exits_with_2(
    layerfold: Any, words: list[object], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = layerfold(*words)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert "Traceback" not in done.err
    assert not list(tmp_path.iterdir())


def test_an_output_that_holds_something_is_left_alone_unless_told(layerfold: Any, model: Path, tmp_path: Path) -> None:
    words = ("compress", "merge", "--model", model, "--n", 2, "--align", "none", "--output-dir")
    kept = tmp_path / "mine" / "notes.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    refused = layerfold(*words, kept.parent)
    assert (refused.code, kept.read_text()) == (2, "mine")
    assert "is not empty; --overwrite replaces it" in refused.err
    assert layerfold(*words, kept).code == 2
    assert layerfold(*words, kept.parent, "--overwrite").code == 0
    assert not kept.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_model_of_one_block_cannot_be_merged(layerfold: Any, tmp_path: Path) -> None:
    tiny("gpt2", n_layer=1).save(tmp_path / "one")
    done = layerfold("compress", "merge", "--model", tmp_path / "one", "--n", 2, "--output-dir", tmp_path / "out")
    assert done.code == 2
    assert "1 block" in done.err


def test_a_model_without_a_tokenizer_can_be_weighed_but_not_read_to(layerfold: Any, tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path / "bare")
    assert layerfold("eval", tmp_path / "bare", "--metrics", "size").code == 0
    done = layerfold("eval", tmp_path / "bare", "--metrics", "perplexity", "--corpus", "imdb")
    assert done.code == 2
    assert "no tokenizer" in done.err


def test_too_little_text_is_said(layerfold: Any, model: Path, write: Any) -> None:
    for content in ("", "short"):
        done = layerfold("eval", model, "--metrics", "perplexity", "--corpus", write("few.txt", content))
        assert done.code == 2
        assert done.err.count("\n") == 1
