"""GGUF files: what is written is what transformers' own reader, and llama.cpp's where it is installed, reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import logits, refused, shared, tiny, token_ids

from layerfold.checkpoint.ggml import _ARCHS, save_gguf
from layerfold.checkpoint.load import load
from layerfold.errors import InputError, OutputError
from layerfold.model.families import FAMILIES

pytest.importorskip("gguf")
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"mlp_bias": False, "attention_bias": False},  # llama.cpp's has no biases
    "qwen3": {"head_dim": 8},  # transformers reads no other size there
    "starcoder2": {"use_bias": True},
}
TEXT = "The river ran in winter, and the other film: naïve 映画!"


def test_all_of_them_are_families() -> None:
    assert set(_ARCHS) <= set(FAMILIES)


@pytest.mark.parametrize("name", sorted(_ARCHS))
def test_it_reads_back_with_the_same_logits_and_tokens(name: str, tmp_path: Path) -> None:
    model = tiny(name, **SETTINGS.get(name, {}))
    save_gguf(model, tmp_path / "model.gguf")
    back = load(tmp_path / "model.gguf")
    assert torch.allclose(logits(back.decoder), logits(model.decoder), atol=1e-4)
    assert back.decoder.context == model.decoder.context
    assert back.require_tokenizer()(TEXT).input_ids == model.require_tokenizer()(TEXT).input_ids


def test_in_half_precision_matrices_are_rounded_and_nothing_else(tmp_path: Path) -> None:
    model = tiny("qwen2")
    save_gguf(model, tmp_path / "half.gguf", "float16")
    save_gguf(model, tmp_path / "whole.gguf")
    back = load(tmp_path / "half.gguf")
    assert torch.allclose(logits(back.decoder), logits(model.decoder), atol=0.05)
    assert (tmp_path / "half.gguf").stat().st_size < 0.8 * (tmp_path / "whole.gguf").stat().st_size


def test_what_a_configuration_cannot_say_is_padded_and_deltas_are_multiplied_out(tmp_path: Path) -> None:
    for model in (shared(tiny("qwen2")), tiny("qwen2")):
        model.decoder.remove_("attention", [3])
        save_gguf(model, tmp_path / "model.gguf", overwrite=True)
        assert torch.allclose(logits(load(tmp_path / "model.gguf").decoder), logits(model.decoder), atol=1e-4)


def test_what_is_not_written_is_refused(tmp_path: Path) -> None:
    with refused(InputError, says="GGUF of a 'mpt'; "):
        save_gguf(tiny("mpt"), tmp_path / "model.gguf")
    with refused(InputError, says="dtype 'bfloat16'; "):
        save_gguf(tiny("gpt2"), tmp_path / "model.gguf", "bfloat16")
    (tmp_path / "there.gguf").write_bytes(b"mine")
    with refused(OutputError, says="is there already; --overwrite replaces it"):
        save_gguf(tiny("gpt2"), tmp_path / "there.gguf")
    assert (tmp_path / "there.gguf").read_bytes() == b"mine"
    assert [path.name for path in tmp_path.iterdir()] == ["there.gguf"]


def test_the_command_writes_one(layerfold: Any, tmp_path: Path) -> None:
    tiny("gpt2").save(tmp_path / "model")
    done = layerfold("export", tmp_path / "model", "--to", "gguf", "--output-dir", tmp_path / "out")
    assert done.code == 0, done.err
    assert done.out.startswith(f"wrote {tmp_path}/out/model.gguf (gguf, float32, ")
    assert torch.allclose(logits(load(tmp_path / "out" / "model.gguf").decoder), logits(tiny("gpt2").decoder), atol=1e-4)


def test_llama_cpp_computes_the_same(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    model = tiny("llama", **SETTINGS["llama"])
    save_gguf(model, tmp_path / "model.gguf")
    read = llama_cpp.Llama(str(tmp_path / "model.gguf"), logits_all=True, verbose=False)
    ids = token_ids(1, 8)
    read.eval(ids[0].tolist())
    assert torch.allclose(torch.tensor(read.scores[:8]), logits(model.decoder, ids)[0], atol=1e-3)
