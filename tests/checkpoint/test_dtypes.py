"""Checkpoints in half precision: read as float32, saved in the dtype they came in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import configure
from safetensors.torch import load_file, save_file
from tiny import logits, tiny, tiny_model, tokenizer
from transformers import AutoModelForCausalLM

import layerfold
from layerfold.checkpoint.compact import COMPACT_WEIGHTS
from layerfold.checkpoint.load import load
from layerfold.checkpoint.save import FORMATS
from layerfold.checkpoint.structure import MANIFEST
from layerfold.checkpoint.weights import DTYPES
from layerfold.errors import InputError, ModelError
from layerfold.evaluators import Size
from layerfold.methods import Drop
from layerfold.study.recipe import Recipe
from layerfold.study.study import Study

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
FORM = pytest.mark.parametrize("form", FORMATS)


def half(folder: Path, dtype: torch.dtype, family: str = "llama") -> Path:
    """A checkpoint as transformers writes it."""
    tiny_model(family).to(dtype).save_pretrained(folder)
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / COMPACT_WEIGHTS
    return load_file(file if file.exists() else folder / "model.safetensors")


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@HALF
@FORM
def test_a_checkpoint_leaves_in_the_dtype_it_came_in(
    dtype: torch.dtype, form: Any, family: str, tmp_path: Path
) -> None:
    base = load(half(tmp_path / "half", dtype, family))
    assert (base.decoder.model.dtype, base.saved_dtype) == (torch.float32, dtype)
    smaller = layerfold.compress(base, Drop(blocks="1"))
    name = str(dtype).removeprefix("torch.")
    assert smaller.save(tmp_path / "small", format=form) == f"{form}, {name}"
    assert {tensor.dtype for tensor in stored(tmp_path / "small").values()} == {dtype}
    assert size(tmp_path / "small") < size(tmp_path / "half")
    manifest = json.loads((tmp_path / "small" / MANIFEST).read_text())
    assert manifest["dtype"] == {"loaded": name, "computed": "float32", "saved": name}
    if form == "dense":  # plain transformers reads the dtype
        assert json.loads((tmp_path / "small" / "config.json").read_text())["dtype"] == name
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").dtype == dtype
    again = load(tmp_path / "small")
    # Nothing but blocks went: every weight that is left is one that half precision holds.
    assert torch.equal(logits(again.decoder), logits(smaller.decoder))
    assert again.saved_dtype == dtype


@FORM
def test_another_dtype_can_be_asked_for(form: Any, tmp_path: Path) -> None:
    base = load(half(tmp_path / "half", torch.bfloat16))
    base.save(tmp_path / "wide", format=form, dtype=torch.float32)
    assert torch.equal(logits(load(tmp_path / "wide").decoder), logits(base.decoder))
    assert load(tmp_path / "wide").saved_dtype == torch.float32
    assert size(tmp_path / "wide") > 1.5 * size(tmp_path / "half")


def norms(tensors: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in tensors if "norm" in name}


def largest(tensors: dict[str, torch.Tensor]) -> set[str]:
    return set(sorted(tensors, key=lambda name: tensors[name].numel())[-8:])


@pytest.mark.parametrize(("of", "chosen", "other"), [("bfloat16", norms, "float32"), ("float32", largest, "bfloat16")])
def test_most_of_the_numbers_decide_and_not_tensors(of: str, chosen: Any, other: str, tmp_path: Path) -> None:
    folder = half(tmp_path / "mixed", getattr(torch, of))
    tensors = load_file(folder / "model.safetensors")
    names = chosen(tensors)
    assert len(names) < len(tensors) / 2
    mixed = {name: tensor.to(getattr(torch, other)) if name in names else tensor for name, tensor in tensors.items()}
    save_file(mixed, folder / "model.safetensors", metadata={"format": "pt"})
    numbers = {dtype: sum(t.numel() for t in mixed.values() if t.dtype == dtype) for dtype in DTYPES.values()}
    assert load(folder).saved_dtype == max(numbers, key=lambda dtype: numbers[dtype]) == torch.bfloat16


def test_a_configuration_that_says_another_dtype_than_the_files_is_not_believed(tmp_path: Path) -> None:
    folder = half(tmp_path / "half", torch.bfloat16)
    configure(folder, dtype="float32")
    assert load(folder).saved_dtype == torch.bfloat16


@FORM
def test_what_a_dtype_cannot_hold_is_refused_and_nothing_is_written(form: Any, tmp_path: Path) -> None:
    model = tiny("gpt2")
    model.decoder.blocks[0].ffn.up.weight[0, 0] = 1e6
    with pytest.raises(
        InputError, match=r"c_fc.weight' holds 1e\+06, too large for float16; accepted: bfloat16 or float32"
    ):
        model.save(tmp_path / "saved", format=form, dtype=torch.float16)
    assert not any(tmp_path.iterdir())


def test_a_model_that_came_from_no_checkpoint_is_saved_in_its_own_dtype(tmp_path: Path) -> None:
    model = tiny("llama")
    model.decoder.model.to(torch.bfloat16)
    assert model.save(tmp_path / "saved") == "dense, bfloat16"


def test_bytes_are_those_of_the_dtype_that_is_saved(tmp_path: Path) -> None:
    base = load(half(tmp_path / "half", torch.bfloat16))
    details = Size()(base).details
    assert (details["dtype"], details["computed_dtype"]) == ("bfloat16", "float32")
    base.save(tmp_path / "saved")
    assert details["bytes"] == size(tmp_path / "saved")


def test_the_command_says_what_it_wrote(tmp_path: Path, layerfold: Any) -> None:
    half(tmp_path / "half", torch.bfloat16)
    drop = ("compress", "drop", "--blocks", "1", "--model", tmp_path / "half")
    for words, wrote in (
        (drop, "dense, bfloat16"),
        ((*drop, "--overwrite", "--save-dtype", "float32"), "dense, float32"),
        (("export", tmp_path / "half", "--to", "compact", "--overwrite"), "compact, bfloat16, 0.1 MB"),
    ):
        done = layerfold(*words, "--output-dir", tmp_path / "out")
        assert (done.code, done.out.splitlines()[-1]) == (0, f"wrote {tmp_path / 'out'} ({wrote})")


@pytest.mark.parametrize("method", ["fp8", "bitsandbytes", "gptq", "awq", "compressed-tensors"])
def test_quantised_weights_are_refused_by_name(method: str, tmp_path: Path, layerfold: Any) -> None:
    """Before any advice on what to install, and before any weight is read."""
    folder = half(tmp_path / "quantised", torch.bfloat16)
    how = {"quant_method": method, "load_in_4bit": True, "bits": 4, "group_size": 128}
    configure(folder, quantization_config=how)
    for words in (("compress", "drop", "--blocks", "1", "--output-dir", tmp_path / "out", "--model"), ("eval",)):
        done = layerfold(*words, folder)
        assert done.code == 2
        assert done.err.startswith(f"layerfold: the weights of {str(folder)!r} are quantised ({method}); accepted: ")
        assert done.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_codes_of_a_quantiser_that_no_configuration_names_are_refused(tmp_path: Path) -> None:
    folder = half(tmp_path / "codes", torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj.weight' as F8_E4M3: quantised weights; accepted: float32, bfloat16"):
        load(folder)


def recipe(corpus: str, variant: dict[str, Any], **changes: Any) -> Recipe:
    calibration = {"corpus": corpus, "tokens": 64}
    document = {"base": "base", "variants": [variant], "evaluate": ["size"], "calibration": calibration}
    return Recipe.model_validate(document | changes)


def test_bytes_of_a_trained_row_are_the_same_when_a_study_goes_on(tmp_path: Path, study_corpus: str) -> None:
    """What was trained is kept in float32, and is still a row of a base that came in bfloat16."""
    half(tmp_path / "half", torch.bfloat16)
    tokenizer().save_pretrained(tmp_path / "half")
    base = load(tmp_path / "half")
    few = {"context": 16, "batch_size": 4, "learning_rate": 1e-3, "validation_tokens": 64, "evaluations": 1}
    training = {"finetune": {"tokens": 64, "corpus": study_corpus, **few}}
    dropped = recipe(study_corpus, {"label": "dropped", "drop": {"blocks": "1"}}, recovery=training)

    def bytes_of() -> list[int]:
        records = Study(dropped, tmp_path / "run", base=base).run()
        return [record.score["bytes"] for record in records if record.evaluator == "size"]

    first = bytes_of()
    assert len(first) == 2
    for path in (tmp_path / "run" / "records").glob("size-*"):
        path.unlink()
    assert bytes_of() == first


def test_a_row_that_is_loaded_is_weighed_anew_in_another_dtype(tmp_path: Path, study_corpus: str) -> None:
    half(tmp_path / "other", torch.bfloat16)
    loaded = recipe(study_corpus, {"label": "other", "load": str(tmp_path / "other")})

    def measured() -> list[str]:
        return [record.label for record in Study(loaded, tmp_path / "run", base=tiny("llama")).run()]

    assert measured() == ["base", "other"]
    assert measured() == []
    load(tmp_path / "other").save(tmp_path / "other", overwrite=True, dtype=torch.float32)
    assert measured() == ["other"]
