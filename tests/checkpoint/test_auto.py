"""Compact checkpoints through transformers' Auto classes, once layerfold has been imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from kinds import Saved, made, with_tokenizer
from tiny import continued, logits, refused, token_ids, tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto import configuration_auto, modeling_auto

from layerfold.checkpoint.auto import CompactConfig, CompactForCausalLM, register_config, register_model
from layerfold.checkpoint.compact import COMPACT_WEIGHTS
from layerfold.checkpoint.load import load
from layerfold.checkpoint.save import FORMATS, hash_weights
from layerfold.checkpoint.structure import MANIFEST
from layerfold.errors import InputError, ModelError
from layerfold.model.decoder import Decoder
from layerfold.model.deltas import ranks
from layerfold.model.masks import held


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("auto") / "shared"
    with_tokenizer("shared", "llama").save(folder, format="compact")
    return folder


@pytest.mark.parametrize("kind", ["shared", "tied", "masked, of several widths, lacking"])
def test_a_compact_checkpoint_is_loaded_as_what_it_holds(kind: str, family: str, saved: Saved) -> None:
    expected = made(kind, family).decoder
    loaded: Any = AutoModelForCausalLM.from_pretrained(saved(kind, family, "compact"))
    assert type(loaded) is type(expected.model)
    assert not loaded.training
    decoder = Decoder(loaded)
    assert torch.equal(logits(decoder), logits(expected))
    assert hash_weights(loaded) == hash_weights(expected.model)
    assert decoder.size() == expected.size()
    assert ranks(decoder) == ranks(expected)
    assert list(held(decoder)) == list(held(expected))
    if family == "mistral":
        assert continued(decoder) == continued(expected, use_cache=False)


def test_its_configuration_and_its_tokenizer_too(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is CompactConfig
    assert config.model_type == "layerfold"
    assert config.decoder["model_type"] == "llama"
    assert config.decoder["num_hidden_layers"] == 4
    assert AutoTokenizer.from_pretrained(folder)("naïve 映画").input_ids == tokenizer()("naïve 映画").input_ids
    assert json.loads((folder / "config.json").read_text()).keys() == {"model_type", "decoder"}


# Processes of their own: here layerfold and transformers have long been imported.
NEITHER = """
import sys, torch
from transformers import AutoModelForCausalLM
for ids, expected, dense, compact in torch.load("asked.pt"):
    model = AutoModelForCausalLM.from_pretrained(dense)
    assert (model(input_ids=ids).logits - expected).abs().max() < 1e-5, dense
    try:
        AutoModelForCausalLM.from_pretrained(compact)
    except ValueError as error:
        assert "model type `layerfold`" in str(error), error
    else:
        raise AssertionError("loaded")
assert not any(name.startswith("layerfold") for name in sys.modules)
"""
CHECK = """
import sys
assert not any(name.split(".")[0] in ("layerfold", "transformers") for name in sys.modules)
{}
config = AutoConfig.from_pretrained("saved")
assert type(config).__name__ == "CompactConfig", config
from transformers import AutoModelForCausalLM, AutoTokenizer
import torch
ids, expected = torch.load("saved.pt")
model = AutoModelForCausalLM.from_pretrained("saved")
assert torch.equal(model(input_ids=ids).logits, expected)
assert torch.equal(layerfold.load("saved").decoder.model(input_ids=ids).logits, expected)
"""
IMPORTS = ("import layerfold", "from transformers import AutoConfig")
PIPELINE = """
from transformers import pipeline
assert pipeline("text-generation", "saved", tokenizer=AutoTokenizer.from_pretrained("saved"))("the", max_new_tokens=2)
"""


def test_new_processes_load_what_they_can_whichever_is_imported_first_or_alone(saved: Saved, tmp_path: Path) -> None:
    model = with_tokenizer("shared", "gpt2")
    model.save(tmp_path / "saved", format="compact")
    torch.save((token_ids(), logits(model.decoder)), tmp_path / "saved.pt")
    cases = [(kind, family) for kind in ("tied", "shared, lacking") for family in ("gpt2", "llama")]
    asked = [(made(*case).decoder, *(str(saved(*case, form)) for form in FORMATS)) for case in cases]
    torch.save([(token_ids(), logits(decoder), *folders) for decoder, *folders in asked], tmp_path / "asked.pt")
    assert not list(saved("tied", "gpt2", "compact").glob("model*"))
    scripts = {
        "transformers alone": NEITHER,
        "layerfold first": CHECK.format("\n".join(IMPORTS)),
        "transformers first": CHECK.format("\n".join(reversed(IMPORTS))) + PIPELINE,
    }
    started = {name: fresh.start(script, tmp_path / name, tmp_path) for name, script in scripts.items()}
    for name, process in started.items():
        assert fresh.finish(process) == 0, f"{name}: {(tmp_path / name).read_text()}"


def test_registering_twice_is_no_error(folder: Path) -> None:
    register_config(configuration_auto)
    register_model(modeling_auto)
    assert type(AutoConfig.from_pretrained(folder)) is CompactConfig
    AutoModelForCausalLM.from_pretrained(folder)


# Options


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("auto", torch.float32),
        (None, torch.float32),
        ("bfloat16", torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float64, torch.float64),
    ],
)
def test_the_type_of_numbers_is_respected(dtype: Any, expected: torch.dtype, folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {expected}
    assert loaded(input_ids=token_ids()).logits.dtype == expected
    assert Decoder(loaded).size() == load(folder).decoder.size()


def test_a_checkpoint_in_half_precision_stays_in_it_unless_told_otherwise(tmp_path: Path) -> None:
    model = made("plain", "llama")
    model.decoder.model.to(torch.bfloat16)
    model.save(tmp_path / "saved", format="compact")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("wrong", ["int8", torch.int8, "foo", "nn", 4, "Tensor"])
def test_what_is_no_type_of_numbers_is_one_line(wrong: Any, folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        CompactForCausalLM.from_pretrained(folder, dtype=wrong)
    assert str(caught.value) == f"dtype {wrong!r}; accepted: auto, or a type of floating-point numbers, as float32"


@pytest.mark.parametrize(
    "option",
    [
        {"device_map": "cpu"},
        {"output_loading_info": True},
        {"attn_implementation": "eager"},
        {"output_hidden_states": True},
        {"use_cache": False},
        {"gguf_file": "x.gguf"},
        {"n_layer": 2},
    ],
    ids=str,
)
def test_an_option_that_would_be_ignored_is_refused(option: dict[str, Any], folder: Path) -> None:
    if "gguf_file" in option:
        with pytest.raises(InputError, match="option 'gguf_file'"):
            CompactForCausalLM.from_pretrained(folder, **option)
        return
    with pytest.raises(InputError) as caught:
        AutoModelForCausalLM.from_pretrained(folder, **option)
    assert str(caught.value) == f"option {next(iter(option))!r} for a compact checkpoint; accepted: dtype"


def test_options_that_say_where_to_look_are_taken(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, trust_remote_code=False, revision="main")


# Damage


def test_what_is_no_folder_is_one_line() -> None:
    with pytest.raises(InputError, match=r"^compact checkpoint 'some/model'; accepted: a folder, to which it was dow"):
        CompactForCausalLM.from_pretrained("some/model")


@pytest.mark.parametrize(
    ("name", "said"),
    [(MANIFEST, "lacks its layerfold.json"), (COMPACT_WEIGHTS, "lacks its weights or its structure")],
)
def test_what_is_missing_is_said(name: str, said: str, copied: Saved) -> None:
    folder = copied("shared", "gpt2", "compact")
    (folder / name).unlink()
    with refused(ModelError, said):
        AutoModelForCausalLM.from_pretrained(folder)
