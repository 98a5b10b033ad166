"""What is saved comes back exactly, in either form."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import continued, logits, tiny, token_ids, tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from layerfold.checkpoint.compact import COMPACT_WEIGHTS
from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import Model
from layerfold.checkpoint.save import FORMATS, bytes_on_disk, hash_weights, read_manifest, read_training_, write_dense
from layerfold.checkpoint.structure import MANIFEST
from layerfold.errors import InputError, ModelError
from layerfold.methods import Collapse, Merge

FORMAT = pytest.mark.parametrize("form", FORMATS)


def plain(family: str) -> Model:
    return tiny(family)


def collapsed(family: str) -> Model:
    model = tiny(family)
    Collapse(n=3, align="none").apply(model.decoder, None)
    return model


def tied(family: str) -> Model:
    model = tiny(family)
    Merge(groups="1-3", align="none", tie=True).apply(model.decoder, None)
    return model


def lacking(family: str) -> Model:
    model = tiny(family)
    model.decoder.remove_("attention", [0, 3])
    model.decoder.remove_("ffn", [1, 3])
    return model


KINDS = pytest.mark.parametrize("build", [plain, collapsed, tied, lacking])
Build = Callable[[str], Model]


@FORMAT
@KINDS
def test_saving_and_loading_gives_bit_equal_logits(build: Build, form: str, family: str, tmp_path: Path) -> None:
    model = build(family)
    model.save(tmp_path / "saved", format=form)
    loaded = load(tmp_path / "saved")
    assert torch.equal(logits(loaded.decoder), logits(model.decoder))
    # What was tied is tied again from the compact form, and copied in the dense one: that is another model to weigh.
    still_tied = loaded.decoder.size() == model.decoder.size()
    assert still_tied == (form == "compact" or build is not tied)
    assert (hash_weights(loaded.decoder.model) == hash_weights(model.decoder.model)) == still_tied
    assert continued(loaded.decoder) == continued(model.decoder, use_cache=False)
    assert loaded.tokenizer is not None
    assert loaded.tokenizer("naïve 映画").input_ids == tokenizer()("naïve 映画").input_ids


@KINDS
def test_the_dense_form_loads_in_plain_transformers(build: Build, family: str, tmp_path: Path) -> None:
    model = build(family)
    model.save(tmp_path / "saved")
    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(reloaded(input_ids=token_ids()).logits, logits(model.decoder))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "saved")) == len(tokenizer())


def test_a_process_that_never_imports_layerfold_loads_the_dense_form_of_tied_models(tmp_path: Path) -> None:
    families = ("gpt2", "llama")
    for family in families:
        model = tied(family)
        model.save(tmp_path / family)
        torch.save((token_ids(), logits(model.decoder)), tmp_path / f"{family}.pt")
    script = f"""
import sys, torch
from transformers import AutoModelForCausalLM
for family in {families!r}:
    ids, expected = torch.load(family + ".pt")
    model = AutoModelForCausalLM.from_pretrained(family)
    assert torch.equal(model(input_ids=ids).logits, expected), family
assert not any(name.startswith("layerfold") for name in sys.modules)
print("equal")
"""
    command = [sys.executable, "-I", "-c", script]  # -I: neither PYTHONPATH nor the current folder
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout == "equal\n", done.stderr


def test_saving_leaves_the_model_as_it_was(family: str, tmp_path: Path) -> None:
    model = tied(family)
    before, size = logits(model.decoder), model.decoder.size()
    for form in FORMATS:
        model.save(tmp_path / form, format=form)
    assert torch.equal(logits(model.decoder), before)
    assert model.decoder.size() == size


def test_compact_is_really_smaller_where_ffns_are_tied(family: str, tmp_path: Path) -> None:
    model = tied(family)
    sizes = {}
    for form in FORMATS:
        model.save(tmp_path / form, format=form)
        sizes[form] = sum(file.stat().st_size for file in (tmp_path / form).glob("*.safetensors"))
        assert sizes[form] == bytes_on_disk(model.decoder, form)
    two_ffns = 2 * 4 * sum(tensor.numel() for tensor in model.decoder.blocks[1].ffn.tensors())
    assert sizes["dense"] - sizes["compact"] >= two_ffns


def test_compact_restores_ties_and_dense_does_not(family: str, tmp_path: Path) -> None:
    model = tied(family)
    for form in FORMATS:
        model.save(tmp_path / form, format=form)
    compact, dense = (load(tmp_path / form).decoder for form in ("compact", "dense"))
    assert compact.size() == model.decoder.size()
    pointers = [[t.data_ptr() for t in block.ffn.tensors()] for block in compact.blocks]
    assert pointers[1] == pointers[2] == pointers[3] != pointers[0]
    assert len({block.ffn.up.weight.data_ptr() for block in dense.blocks}) == 4
    assert dense.size() == tiny(family).decoder.size()


def test_what_is_removed_is_named_and_only_the_dense_form_holds_its_zeros(family: str, tmp_path: Path) -> None:
    model = lacking(family)
    whole = set(tiny(family).decoder.model.state_dict())
    gone = {name for name in whole if name.startswith(model.decoder.removed_prefixes)}
    assert gone
    for form in FORMATS:
        model.save(tmp_path / form, format=form)
        manifest = read_manifest(tmp_path / form)
        assert manifest is not None
        assert manifest["removed"] == {"attention": [0, 3], "ffn": [1, 3]}
        loaded = load(tmp_path / form)
        assert loaded.sha256 == model.sha256
        assert loaded.decoder.size() == model.decoder.size()
        assert loaded.decoder.size().parameters < tiny(family).decoder.size().parameters
        assert loaded.decoder.removed_parts == model.decoder.removed_parts
    compact = load_file(tmp_path / "compact" / COMPACT_WEIGHTS)
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    assert not gone & compact.keys()
    assert gone <= dense.keys()
    assert not any(dense[name].any() for name in gone)
    assert all(dense[name].shape == tiny(family).decoder.model.state_dict()[name].shape for name in gone)


def test_a_tied_ffn_of_which_one_use_is_removed_comes_back(tmp_path: Path) -> None:
    model = tied("llama")
    model.decoder.remove_("ffn", [1])  # the one that gave the tensors their names
    for form in FORMATS:
        model.save(tmp_path / form, format=form)
        loaded = load(tmp_path / form).decoder
        assert torch.equal(logits(loaded), logits(model.decoder))
        assert (loaded.size() == model.decoder.size()) == (form == "compact")


@FORMAT
def test_a_manifest_of_before_there_was_anything_to_remove_is_read(form: str, tmp_path: Path) -> None:
    model = plain("gpt2")
    model.save(tmp_path, format=form, overwrite=True)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    del manifest["removed"]
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    assert load(tmp_path).sha256 == model.sha256


@FORMAT
@pytest.mark.parametrize(
    "removed",
    [
        {"attention": [4]},
        {"attention": [-1]},
        {"attention": [0, 0]},
        {"attention": 0},
        {"attention": "03"},
        {"attention": [0.0]},
        {"attention": [[0]]},
        {"attention": None},
        {"atention": [0]},
        ["attention"],
        "attention",
        None,
        1,
    ],
)
def test_a_damaged_list_of_what_is_removed_is_one_line(form: str, removed: Any, tmp_path: Path) -> None:
    lacking("gpt2").save(tmp_path / "saved", format=form)
    path = tmp_path / "saved" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"removed": removed}))
    with pytest.raises(ModelError, match=r"layerfold\.json' is damaged: .") as caught:
        load(tmp_path / "saved")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("form", "removed", "said"),
    [
        ("dense", {"attention": [0, 1]}, "'transformer.h.1.ln_1.weight' is not zero where the model has nothing"),
        ("dense", {"ffn": [0]}, "'transformer.h.0.ln_2.weight' is not zero where the model has nothing"),
        ("compact", {"attention": [0]}, "cannot be read"),
        ("compact", {"attention": [0, 1, 3], "ffn": [1, 3]}, "cannot be read"),
        ("compact", {"attention": [1, 3], "ffn": [1, 3]}, "cannot be read"),
    ],
)
def test_a_list_that_names_other_sublayers_than_are_gone_is_one_line(
    form: Any, removed: Any, said: str, tmp_path: Path
) -> None:
    lacking("gpt2").save(tmp_path / "saved", format=form)
    path = tmp_path / "saved" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"removed": removed}))
    with pytest.raises(ModelError) as caught:
        load(tmp_path / "saved")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_hash_of_weights_tells_what_is_removed_from_what_is_zero() -> None:
    zeros = tiny("gpt2").decoder
    for name, tensor in zeros.model.state_dict().items():
        if name.startswith(("transformer.h.1.attn.", "transformer.h.1.ln_1.")):
            tensor.zero_()
    attention, ffn, other = (tiny("gpt2").decoder for _ in range(3))
    attention.remove_("attention", [1])
    ffn.remove_("ffn", [1])
    other.remove_("attention", [2])
    assert torch.equal(logits(zeros), logits(attention))
    assert len({hash_weights(decoder.model) for decoder in (tiny("gpt2").decoder, zeros, attention, ffn, other)}) == 5


def test_compact_keeps_embeddings_tied_as_the_architecture_ties_them(tmp_path: Path) -> None:
    for family in ("gpt2", "llama"):
        model = plain(family)
        model.save(tmp_path / family, format="compact")
        loaded = load(tmp_path / family).decoder.model
        one, two = (module.weight for module in (loaded.get_input_embeddings(), loaded.get_output_embeddings()))
        assert (one is two) is (family == "gpt2")


def test_plain_transformers_refuses_the_compact_form(tmp_path: Path) -> None:
    tied("gpt2").save(tmp_path / "saved", format="compact")
    assert not list((tmp_path / "saved").glob("model*"))
    assert (tmp_path / "saved" / COMPACT_WEIGHTS).is_file()
    script = "from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained('saved')"
    command = [sys.executable, "-I", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode
    assert "model type `layerfold`" in done.stderr


def test_forms_convert_into_each_other(tmp_path: Path) -> None:
    model = tied("llama")
    model.save(tmp_path / "a", format="compact")
    load(tmp_path / "a").save(tmp_path / "b", format="dense")
    load(tmp_path / "b").save(tmp_path / "c", format="compact")
    assert torch.equal(logits(load(tmp_path / "c").decoder), logits(model.decoder))


def test_a_model_without_a_tokenizer_is_saved_without_one(tmp_path: Path) -> None:
    model = plain("gpt2")
    Model(model.decoder, None, model.provenance).save(tmp_path / "saved")
    assert load(tmp_path / "saved").tokenizer is None


@FORMAT
def test_provenance_comes_back(form: str, tmp_path: Path) -> None:
    model = tied("gpt2").with_step({"name": "merge", "seed": 3})
    model.save(tmp_path / "saved", format=form)
    manifest = read_manifest(tmp_path / "saved")
    assert manifest is not None
    assert manifest["format"] == form
    assert json.loads((tmp_path / "saved" / MANIFEST).read_text()) == manifest
    loaded = load(tmp_path / "saved")
    assert loaded.provenance.base == "tiny"
    assert loaded.provenance.steps == ({"name": "merge", "seed": 3},)
    assert loaded.provenance.versions["layerfold" if "layerfold" in loaded.provenance.versions else "torch"]


def test_a_folder_without_a_manifest_has_none(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None


def test_the_hash_of_weights_follows_names_shapes_and_values() -> None:
    model = tiny("gpt2").decoder.model
    before = hash_weights(model)
    assert before == hash_weights(tiny("gpt2").decoder.model) != hash_weights(tiny("gpt2", seed=1).decoder.model)
    model.transformer.h[0].ln_1.bias.data[0] += 1e-3
    assert hash_weights(model) != before


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown format 'compat'; did you mean 'compact'"):
        plain("gpt2").save(tmp_path / "saved", format="compat")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


# The weights alone, as training writes and reads them


@KINDS
def test_weights_that_were_written_are_read_into_another_of_the_structure(
    build: Build, family: str, tmp_path: Path
) -> None:
    model, other = build(family), build(family)
    with torch.no_grad():
        for parameter in other.decoder.model.parameters():
            parameter.add_(1.0)
    write_dense(model.decoder.model, tmp_path / "weights")
    read_training_(other.decoder.model, tmp_path / "weights")
    assert hash_weights(other.decoder.model) == hash_weights(model.decoder.model), "ties too"
    plain_ = AutoModelForCausalLM.from_pretrained(tmp_path / "weights")
    assert torch.equal(plain_(token_ids()).logits, logits(model.decoder))


def test_weights_that_are_given_are_written_in_place_of_the_models_own(tmp_path: Path) -> None:
    model = tied("gpt2").decoder.model
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    write_dense(model, tmp_path / "weights", state)
    other = tied("gpt2").decoder.model
    read_training_(other, tmp_path / "weights")
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())
    assert torch.equal(model.state_dict()["lm_head.weight"] + 1, state["lm_head.weight"]), "and the model is let alone"


def test_weights_that_are_not_zero_where_a_sublayer_was_removed_are_of_another_model(tmp_path: Path) -> None:
    write_dense(plain("gpt2").decoder.model, tmp_path / "weights")
    model = lacking("gpt2").decoder.model
    before = hash_weights(model)
    with pytest.raises(ModelError, match=r"the weights in .* is not zero where the model has nothing$"):
        read_training_(model, tmp_path / "weights")
    assert hash_weights(model) == before


@pytest.mark.parametrize("damage", ["short", "empty", "none", "missing", "stray", "shape"])
def test_weights_that_do_not_fit_are_one_line(damage: str, tmp_path: Path) -> None:
    model = plain("gpt2").decoder.model
    write_dense(model, tmp_path / "weights")
    path = tmp_path / "weights" / "model.safetensors"
    found = load_file(path)
    name = "transformer.h.1.mlp.c_fc.weight"
    if damage == "short":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "none":
        path.unlink()
    else:
        tensor = found.pop(name)
        added = {"missing": {}, "stray": {name: tensor, "stray": tensor.clone()}, "shape": {name: tensor[:1].clone()}}
        save_file(found | added[damage], path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="the weights in") as caught:
        read_training_(plain("gpt2").decoder.model, tmp_path / "weights")
    assert "\n" not in str(caught.value)
    if damage == "stray":
        assert "stray" in str(caught.value)
