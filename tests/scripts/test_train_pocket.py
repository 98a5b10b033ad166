"""The script that rebuilds pocket: a short run on the processor."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from layerfold.checkpoint.load import load
from layerfold.text.corpora import load_corpus

ROOT = Path(__file__).parents[2]
SHORT = ("--steps", "4", "--batch", "2", "--validate-every", "2", "--no-compile")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, on a few reviews and a small vocabulary."""
    spec = importlib.util.spec_from_file_location("train_pocket", ROOT / "scripts/train_pocket.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def few(name: str, split: str) -> Any:
        return type("Few", (), {"documents": load_corpus(name, split).documents[:30]})

    monkeypatch.setattr(module, "load_corpus", few)
    monkeypatch.setattr(module, "VALIDATION_WINDOWS", 2)
    monkeypatch.setattr(module, "VOCABULARY", 512)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    return module


def test_a_short_run_writes_a_model_a_tokenizer_and_a_log(script: Any, tmp_path: Path) -> None:
    script.main(["--output-dir", str(tmp_path / "pocket"), *SHORT])
    lines = [json.loads(line) for line in (tmp_path / "pocket" / "training.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert lines[1]["validation_perplexity"] < lines[0]["validation_perplexity"] < 600
    model = load(tmp_path / "pocket")
    assert (model.decoder.n_blocks, model.decoder.d_model, model.decoder.context) == (12, 192, 256)
    assert model.saved_dtype == torch.float16
    assert model.require_tokenizer().eos_token_id == 0
    config = model.decoder.model.config
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0, 0, 0)
    assert not (tmp_path / "pocket" / "state.pt").exists()
    with pytest.raises(SystemExit, match="holds a model that is trained to its end"):
        script.main(["--output-dir", str(tmp_path / "pocket"), *SHORT])


def test_a_killed_run_goes_on_and_ends_with_the_same_weights(script: Any, tmp_path: Path) -> None:
    script.main(["--output-dir", str(tmp_path / "whole"), *SHORT])
    schedule = script.schedule

    def killed(step: int, steps: int) -> float:
        if step == 3:
            raise KeyboardInterrupt
        found: float = schedule(step, steps)
        return found

    script.schedule = killed
    with pytest.raises(KeyboardInterrupt):
        script.main(["--output-dir", str(tmp_path / "killed"), *SHORT])
    for more, said in ((["--batch", "3"], "batch"), (["--steps", "1"], "steps")):
        with pytest.raises(SystemExit, match=f"holds a run with another {said}: repeat its arguments"):
            script.main(["--output-dir", str(tmp_path / "killed"), *SHORT, *more])
    script.schedule = schedule
    script.main(["--output-dir", str(tmp_path / "killed"), *SHORT])
    whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_the_defaults_are_the_embedded_weights_recipe(script: Any) -> None:
    found = script.parse(["--output-dir", "x"])
    assert (found.steps, found.batch, found.lr, found.dropout) == (7104, 64, 0.02, 0.1)
    muon, adam = script.build_optimizers(script.build_model(0.1), found.lr)
    assert (muon.defaults["momentum"], muon.defaults["weight_decay"]) == (0.95, 0.1)
    assert [group["weight_decay"] for group in adam.param_groups] == [0.1, 0.0]
    assert [group["lr"] for group in adam.param_groups] == pytest.approx([3e-3, 3e-3])
    assert [script.schedule(step, 7104) for step in (0, 99, 2000, 7104)] == pytest.approx([0.01, 1.0, 1.0, 0.0])


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--steps", "0"], "steps 0; accepted: 1 or more"), (["--device", "cuda"], "torch finds no CUDA GPU")],
)
def test_bad_input_is_one_line(script: Any, words: list[str], said: str, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        script.parse(["--output-dir", "x", *words])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
