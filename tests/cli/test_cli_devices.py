"""`--device` and `--dtype` of the commands, and the same keys of a recipe."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from layerfold.environment import DEVICE_VARIABLE, DTYPE_VARIABLE, OFFLOAD_VARIABLE


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--device gpu", "device 'gpu'"),
        ("--device cuda:99", "device 'cuda:99', and of such GPUs torch finds"),
        ("--dtype int8", "dtype 'int8'"),
        ("--dtype bfloat", "did you mean 'bfloat16'"),
        ("--offload allways", "always"),
    ],
)
@pytest.mark.parametrize("command", ["eval {model}", "compress drop --model {model} --blocks 1 --output-dir out"])
def test_what_there_is_not_is_one_line_and_nothing_is_written(
    layerfold: Any, model: Path, monkeypatch: pytest.MonkeyPatch, command: str, words: str, said: str
) -> None:
    monkeypatch.chdir(model.parent)
    done = layerfold(*command.format(model=model).split(), *words.split())
    assert done.code == 2
    assert done.err.startswith("layerfold: ")
    assert done.err.count("\n") == 1
    assert said in done.err
    assert not Path("out").exists()


def test_half_precision_is_computed_in_and_the_stored_dtype_kept(
    layerfold: Any, model: Path, study_corpus: str, tmp_path: Path
) -> None:
    words = ("--corpus", study_corpus, "--repair", "refit", "--repair-tokens", 300)
    out = tmp_path / "out"
    done = layerfold("compress", "drop", "--model", model, "--blocks", "1", *words, "--output-dir", out)
    assert done.code == 0
    half = tmp_path / "half"
    done = layerfold(
        "compress", "drop", "--model", model, "--blocks", "1", *words, "--output-dir", half,
        "--dtype", "bfloat16", "--device", "cpu",
    )  # fmt: skip
    assert done.code == 0, done.err
    kinds = []
    for folder in (out, half):
        with safe_open(folder / "model.safetensors", "pt") as opened:
            kinds.append({opened.get_slice(name).get_dtype() for name in opened.keys()})  # noqa: SIM118
    assert kinds == [{"F32"}, {"F32"}]
    assert os.environ.get(DEVICE_VARIABLE) == "cpu", "what the tests set"
    assert os.environ.get(DTYPE_VARIABLE) is None
    scores = []
    for dtype in ("float32", "bfloat16"):
        measured = layerfold(
            "eval",
            half,
            "--metrics",
            "size,perplexity",
            "--corpus",
            study_corpus,
            "--split",
            "test",
            "--json",
            "--dtype",
            dtype,
        )
        scores.append(json.loads(measured.out))
    assert [each["size"]["computed_dtype"] for each in scores] == ["float32", "bfloat16"]
    exact, rounded = (each["perplexity"]["value"] for each in scores)
    assert rounded == pytest.approx(exact, rel=0.05)
    assert rounded != exact


def test_weights_that_wait_in_files_give_the_same_checkpoint_and_figures(
    layerfold: Any, model: Path, study_corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerfold.memory.mapped.LEAST_BYTES", 0)
    words = ("--corpus", study_corpus, "--repair", "refit", "--repair-tokens", 300)
    files, told = [], []
    for offload in ("always", "never"):
        out = tmp_path / offload
        done = layerfold(
            "compress", "drop", "--model", model, "--blocks", "1", *words, "--output-dir", out, "--offload", offload
        )
        assert done.code == 0, done.err
        files.append(load_file(out / "model.safetensors"))
        measured = layerfold(
            "eval", out, "--corpus", study_corpus, "--split", "test", "--limit-tokens", 500, "--metrics",
            "perplexity,size", "--json", "--offload", offload,
        )  # fmt: skip
        assert measured.code == 0, measured.err
        told.append(json.loads(measured.out))
    assert OFFLOAD_VARIABLE not in os.environ
    assert files[0].keys() == files[1].keys()
    for name, tensor in files[0].items():
        assert torch.allclose(tensor, files[1][name], rtol=1e-4, atol=1e-6)
    one, two = ([each["perplexity"]["value"], each["size"]["bytes"]] for each in told)
    assert one == pytest.approx(two, rel=1e-5)


def test_a_recipe_says_whether_weights_wait_and_that_measures_nothing_anew(
    layerfold: Any, model: Path, study_corpus: str, tmp_path: Path
) -> None:
    file, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe: dict[str, Any] = {
        "base": str(model),
        "variants": [{"label": "dropped", "drop": {"blocks": "1"}}],
        "evaluate": [{"perplexity": {"corpus": study_corpus, "limit_tokens": 256}}],
        "calibration": {"corpus": study_corpus},
    }
    found = []
    for changes in ({}, {"offload": "always"}):
        file.write_text(yaml.safe_dump(recipe | changes))
        done = layerfold("study", file, "--output-dir", folder)
        assert done.code == 0, done.err
        found.append({each: each.stat().st_mtime_ns for each in (folder / "records").rglob("*.json")})
    assert found[0] == found[1]
    file.write_text(yaml.safe_dump(recipe | {"offload": "sometimes"}))
    done = layerfold("study", file, "--output-dir", folder)
    assert done.code == 2
    assert "offload 'sometimes'; accepted: always, auto, never" in done.err


def test_a_recipe_names_the_dtype_and_another_one_is_measured_anew(
    layerfold: Any, model: Path, study_corpus: str, tmp_path: Path
) -> None:
    recipe = {
        "base": str(model),
        "variants": [{"label": "dropped", "drop": {"blocks": "1"}}],
        "evaluate": [{"perplexity": {"corpus": study_corpus, "limit_tokens": 256}}],
        "calibration": {"corpus": study_corpus},
    }
    folder = tmp_path / "run"

    def measured(**changes: Any) -> dict[str, dict[str, Any]]:
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe | changes))
        done = layerfold("study", file, "--output-dir", folder)
        assert done.code == 0, done.err
        records = [json.loads(each.read_text()) for each in (folder / "records").rglob("*.json")]
        return {record["key"]: record for record in records}

    plain = measured()
    assert {record["environment"].get("dtype") for record in plain.values()} == {None}
    both = measured(dtype="bfloat16", device="cpu")
    file, again = tmp_path / "recipe.yaml", tmp_path / "again"
    file.write_text(yaml.safe_dump(recipe | {"dtype": "float16", "device": "cuda:7"}))
    assert layerfold("study", file, "--output-dir", again, "--dtype", "bfloat16", "--device", "cpu").code == 0
    told = json.loads((again / "study.json").read_text())["recipe"]
    assert not {"dtype", "device"} & told.keys(), "an option comes before the recipe"
    assert {each.name for each in (again / "records").rglob("*.json")} == {
        each.name for each in (folder / "records").rglob("*.json") if json.loads(each.read_text())["key"] not in plain
    }
    new = [record for key, record in both.items() if key not in plain]
    assert len(plain) == len(new) == 2
    assert {record["environment"]["dtype"] for record in new} == {"bfloat16"}
    assert "bfloat16" in (folder / "report.html").read_text()
    assert measured(dtype="bfloat16") == both


def test_an_unknown_device_in_a_recipe_is_one_line(layerfold: Any, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"base": str(model), "variants": [], "device": "npu"}))
    done = layerfold("study", file, "--output-dir", tmp_path / "run")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "device 'npu'" in done.err


def test_too_little_memory_on_a_gpu_is_one_line(layerfold: Any, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 8 GiB.\nMore. And more."
        )

    monkeypatch.setattr("layerfold.checkpoint.load.load", full)
    done = layerfold("eval", model)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "Tried to allocate 20.00 GiB; accepted: --offload always, --dtype bfloat16, --device cpu" in done.err
    assert "--set gradient_checkpointing=true" in done.err
