"""GGUF files: transformers' own reader and llama.cpp itself compute from them what the model computes."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import logits, refused, shared, tiny, token_ids
from tokenizers import pre_tokenizers
from torch import Tensor

from layerfold.checkpoint.ggml import save_gguf
from layerfold.checkpoint.ggml_architectures import ARCHITECTURES
from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import Model
from layerfold.errors import InputError, OutputError
from layerfold.model.families import FAMILIES

pytest.importorskip("gguf")
_GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"mlp_bias": False, "attention_bias": False},  # which transformers does not put in order
    "mistral": {"sliding_window": None},  # llama.cpp has none there
    "qwen3": {"head_dim": 128},  # transformers takes no other from the file
    "starcoder2": {"sliding_window": None},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "olmo3": {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA | {"layer_types": ["sliding_attention"] * 4},
}
READ_BY_TRANSFORMERS = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "starcoder2")
HALF_TABLES = ("gpt2", "gpt_bigcode", "gpt_neox", "falcon", "phi", "starcoder2", "gemma", "gemma2", "gemma3_text")
"""llama.cpp looks GELU up in a table of float16."""
SHORT = "the other, naïve 映"
TEXT = "The river ran in winter, and the other film: naïve 映画!"


def made(name: str, **more: Any) -> Model:
    return tiny(name, **SETTINGS.get(name, {}) | more)


def test_all_of_them_are_families() -> None:
    assert set(ARCHITECTURES) <= set(FAMILIES)


@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
def test_it_reads_back_with_the_same_logits_and_tokens(name: str, tmp_path: Path) -> None:
    model = made(name)
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


def test_what_no_configuration_says_is_padded_and_deltas_are_multiplied_out(tmp_path: Path) -> None:
    for model in (shared(tiny("gpt2")), tiny("gpt2")):
        model.decoder.remove_("attention", [3])
        assert save_gguf(model, tmp_path / "model.gguf", overwrite=True) == "gpt2"
        assert torch.allclose(logits(load(tmp_path / "model.gguf").decoder), logits(model.decoder), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "more", "says"),
    [
        ("mpt", {}, "GGUF of a 'mpt'; "),
        ("mistral", {"sliding_window": 12}, "block 0 has sliding_attention, where llama.cpp computes full_attention"),
        (
            "gemma3_text",
            {"layer_types": ["full_attention"] * 4},
            "block 0 has full_attention, where llama.cpp computes",
        ),
        ("gemma2", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar 16; llama.cpp takes head_dim, 256"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}, "llama.cpp rotates the positions of other blocks than"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "its rotary frequencies are scaled",
        ),
        ("llama", {"hidden_act": "relu"}, "hidden_act 'relu'; llama.cpp computes 'silu'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True; "),
        ("olmo", {"clip_qkv": 0.3}, "clip_qkv 0.3; llama.cpp computes None"),
        ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping None; llama.cpp computes 30.0"),
        ("qwen3", {"attention_bias": True}, "attention_bias True; llama.cpp computes False"),
        ("phi", {"tie_word_embeddings": True}, "tie_word_embeddings True; llama.cpp reads False"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    name: str, more: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with refused(InputError, says=says):
        save_gguf(made(name, **more), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def fewer_heads(name: str) -> Model:
    """A model whose heads no longer take the whole width together, as after `prune --uniform`."""
    model = made(name)
    model.decoder.keep_heads_(dict.fromkeys(range(4), torch.tensor([1])))
    model.decoder.tell_heads_()
    return model


def test_heads_that_take_less_than_the_width_and_no_attention_at_all_are_refused(tmp_path: Path) -> None:
    with refused(InputError, says="heads that do not take the whole width together"):
        save_gguf(fewer_heads("starcoder2"), tmp_path / "model.gguf")
    model = made("qwen3")
    model.decoder.remove_("attention", range(4))
    with refused(InputError, says="GGUF of a qwen3 without any attention"):
        save_gguf(model, tmp_path / "model.gguf")


def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(tmp_path: Path) -> None:
    model = made("gpt2")
    for pre, says in (
        (pre_tokenizers.ByteLevel(add_prefix_space=True), "splits texts in a way that llama.cpp has no name for"),
        (
            pre_tokenizers.Sequence(
                [pre_tokenizers.Split("x", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
            "splits texts in a way",
        ),
    ):
        tokenizer = copy.deepcopy(model.require_tokenizer())
        tokenizer.backend_tokenizer.pre_tokenizer = pre
        with refused(InputError, says=says):
            save_gguf(replace(model, tokenizer=tokenizer), tmp_path / "model.gguf")
    tokenizer = copy.deepcopy(model.require_tokenizer())
    tokenizer.add_tokens(["<new>"])
    with refused(InputError, says="a tokenizer of token 263, and a vocabulary of 263"):
        save_gguf(replace(model, tokenizer=tokenizer), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_stays(tmp_path: Path) -> None:
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
    tiny("gpt2").save(tmp_path / "half", dtype=torch.float16)
    done = layerfold("export", tmp_path / "half", "--to", "gguf", "--output-dir", tmp_path / "half.gguf")
    assert done.out.startswith(f"wrote {tmp_path}/half.gguf (gguf, float16, ")
    back = load(tmp_path / "out" / "model.gguf")
    assert torch.allclose(logits(back.decoder), logits(tiny("gpt2").decoder), atol=1e-4)


def llama_cpp(folder: Path, prompts: Mapping[Path, list[Any]], tokens: int) -> dict[Path, Tensor]:
    """Return the log probabilities that llama.cpp computes from files, (prompts, tokens) each."""
    pytest.importorskip("xllamacpp")
    asked = folder / "asked.json"
    asked.write_text(json.dumps({str(path): [tokens, each] for path, each in prompts.items()}))
    script = Path(__file__).with_name("llamacpp.py")
    done = subprocess.run([sys.executable, script, asked], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return {Path(path): torch.tensor(each) for path, each in json.loads(done.stdout.splitlines()[-1]).items()}


def ours(model: Model, prompts: list[list[int]]) -> Tensor:
    """Return a model's log probabilities after prompts, (prompts, tokens)."""
    return torch.stack([logits(model.decoder, torch.tensor([ids]))[0, -1].log_softmax(-1) for ids in prompts])


def test_llama_cpp_computes_the_same_from_every_family(tmp_path: Path) -> None:
    ids = token_ids(1, 24)[0].tolist()
    prompts = [ids[:1], ids[:5], ids]
    models = {tmp_path / f"{name}.gguf": made(name) for name in ARCHITECTURES}
    for path, model in models.items():
        save_gguf(model, path)
    found = llama_cpp(tmp_path, dict.fromkeys(models, prompts), 263)
    for path, model in models.items():
        worst = float((found[path] - ours(model, prompts)).abs().max())
        assert worst < (2e-2 if path.stem in HALF_TABLES else 1e-4), (path.stem, worst)


def test_llama_cpp_reads_unequal_blocks_without_padding_and_texts_as_the_tokenizer(tmp_path: Path) -> None:
    models = {}
    for name in ("llama", "mistral", "qwen2"):
        model = made(name)
        save_gguf(model, tmp_path / f"whole_{name}.gguf")
        model.decoder.keep_neurons_({0: torch.arange(20), 3: torch.arange(40)})
        model.decoder.keep_heads_({3: torch.tensor([1])})
        model.decoder.remove_("attention", [1])
        model.decoder.remove_("ffn", [2])
        path = tmp_path / f"{name}.gguf"
        assert save_gguf(model, path) == "deci"
        models[path] = model
        assert path.stat().st_size < 0.85 * (tmp_path / f"whole_{name}.gguf").stat().st_size
    for name in ("qwen2", "qwen3", "llama"):
        models[path := tmp_path / f"fewer_heads_{name}.gguf"] = model = fewer_heads(name)
        assert save_gguf(model, path) == ("deci" if name == "qwen2" else name)
    for part, block in (("attention", 0), ("ffn", 3)):
        models[path := tmp_path / f"without_{part}.gguf"] = model = made("llama")
        model.decoder.remove_(part, [block])
        if part == "ffn":
            model.decoder.remove_("attention", [block])
        assert save_gguf(model, path) == "llama"  # padded: there llama.cpp cannot do without
    found = llama_cpp(tmp_path, {path: [SHORT] for path in models}, 263)
    for path, model in models.items():
        assert torch.allclose(found[path], ours(model, [model.require_tokenizer()(SHORT).input_ids]), atol=1e-4)
