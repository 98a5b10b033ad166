"""What reads a checkpoint, and what is said of one that does not fit together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import refused, shared, tiny

from layerfold.checkpoint.check import Checked, check
from layerfold.errors import InputError


def answers(found: Checked) -> dict[str, str]:
    return {reader.name: reader.answer for reader in found.readers}


def test_a_dense_checkpoint_loads_in_a_process_without_layerfold(tmp_path: Path) -> None:
    tiny("qwen3").save(tmp_path / "model")
    found = check(tmp_path / "model")
    assert answers(found) == {"transformers": "loads"} | dict.fromkeys(("vLLM", "llama.cpp", "PEFT"), "should load")
    assert found.parameters == found.stored == tiny("qwen3").decoder.size().parameters
    assert found.bytes == (tmp_path / "model" / "model.safetensors").stat().st_size
    assert found.warnings == ()


def test_uneven_blocks_load_padded_and_how_much_larger_is_said(tmp_path: Path) -> None:
    model = tiny("llama")
    model.decoder.keep_neurons_({1: torch.arange(12)})
    model.save(tmp_path / "model")
    found = check(tmp_path / "model")
    assert answers(found)["transformers"] == "loads padded"
    assert answers(found)["vLLM"] == "should load padded"
    own, whole = found.parameters, tiny("llama").decoder.size().parameters
    assert answers(found)["llama.cpp"] == "should load"
    assert "each block with sizes of its own (deci)" in found.readers[2].why
    said = f"{whole:,} parameters where the model has {own:,}, {whole / own:.2f} times; "
    assert found.readers[0].why.startswith(said)


def test_a_compact_one_is_for_layerfold(tmp_path: Path) -> None:
    shared(tiny("gpt2")).save(tmp_path / "model", format="compact")
    found = check(tmp_path / "model")
    assert answers(found).pop("llama.cpp") == "should load"
    others = [reader for reader in found.readers if reader.name != "llama.cpp"]
    assert {reader.answer for reader in others} == {"does not load"}
    assert all("layerfold export --to dense" in reader.why for reader in others)


def test_what_llama_cpp_does_not_compute_is_said(tmp_path: Path) -> None:
    tiny("mpt").save(tmp_path / "model")
    reader = check(tmp_path / "model").readers[2]
    assert (reader.name, reader.answer) == ("llama.cpp", "does not load")
    assert reader.why.startswith("GGUF of a 'mpt'; ")
    model = tiny("gpt2")
    model.decoder.remove_("ffn", [1])
    model.save(tmp_path / "padded")
    assert answers(check(tmp_path / "padded"))["llama.cpp"] == "should load padded"


def test_weights_that_layerfold_did_not_write_are_compared_too(tmp_path: Path, layerfold: Any) -> None:
    """layerfold reads what it is told to, and so does transformers: a manifest that says otherwise shows."""
    model = tiny("gpt2")
    model.decoder.remove_("ffn", [1])
    model.save(tmp_path / "model")
    manifest = tmp_path / "model" / "layerfold.json"
    assert layerfold("check", tmp_path / "model").code == 0
    text = json.loads(manifest.read_text())
    text["removed"] = {"attention": [], "ffn": []}
    manifest.write_text(json.dumps(text))
    assert layerfold("check", tmp_path / "model").code == 0  # zeros compute the same
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("h.1.mlp.c_fc.weight"))
    del weights[name]
    save_file(weights, file, {"format": "pt"})
    done = layerfold("check", tmp_path / "model")
    assert done.code == 2
    assert "missing keys" in done.err


def test_what_does_not_fit_together_is_said(tmp_path: Path, layerfold: Any) -> None:
    tiny("gpt2").save(tmp_path / "model")
    settings = tmp_path / "model" / "generation_config.json"
    settings.write_text(json.dumps({"eos_token_id": 99_999}))
    done = layerfold("check", tmp_path / "model")
    assert done.code == 0
    assert "transformers: loads: logits differ by at most" in done.out
    assert done.err == "warning: its end of text is token 99999, and its vocabulary has 263\n"
    found = json.loads(layerfold("check", tmp_path / "model", "--json").out)
    assert found["format"] == "dense"


def test_no_folder_is_refused(tmp_path: Path) -> None:
    with refused(InputError, says="no checkpoint folder at"):
        check(tmp_path / "nowhere")
