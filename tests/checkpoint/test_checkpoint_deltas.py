"""Models that share FFNs come back exactly in the compact form, and multiplied out in the dense one."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILY_NAMES, chosen, continued, logits, sparsify, tiny, token_ids
from transformers import AutoModelForCausalLM

from layerfold.checkpoint.compact import COMPACT_WEIGHTS
from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import Model, Provenance
from layerfold.checkpoint.save import FORMATS, bytes_on_disk, hash_weights
from layerfold.checkpoint.structure import MANIFEST
from layerfold.errors import ModelError
from layerfold.files import hash_file
from layerfold.methods import Merge, Prune, Share
from layerfold.model.decoder import Decoder
from layerfold.model.deltas import factored, multiplied_out, ranks
from layerfold.model.masks import held, hold_

PLAIN = {"init": "svd", "align": "none"}


@functools.cache
def _made(family: str) -> Decoder:
    return tiny(family).decoder


def model_of(decoder: Decoder) -> Model:
    """Without a tokenizer, which takes most of the time of a load."""
    return Model(decoder, None, Provenance("tiny"))


def share_(decoder: Decoder, window: str, **settings: Any) -> Decoder:
    Share(window=window, **PLAIN | settings).apply(decoder, None)  # type: ignore[arg-type]
    return decoder


def uniform(family: str) -> Decoder:
    return share_(_made(family).copy(), "1:3", rank=4)


def anchored(family: str) -> Decoder:
    return share_(_made(family).copy(), "1:3", rank=4, base="anchor", anchor="last")


def allotted(family: str) -> Decoder:
    return share_(_made(family).copy(), "0:4", rank=2, ranks="allotted", base="mean")


def without_delta(family: str) -> Decoder:
    return share_(_made(family).copy(), "0:2", rank=0)


def twice(family: str) -> Decoder:
    return share_(share_(_made(family).copy(), "2:2", rank=5), "0:2", rank=3, init="zero", base="mean")


def lacking(family: str) -> Decoder:
    decoder = share_(_made(family).copy(), "2:2", rank=4)
    decoder.remove_("attention", [0, 3])
    decoder.remove_("ffn", [1])
    return decoder


def narrow(family: str) -> Decoder:
    decoder = _made(family).copy()
    decoder.keep_neurons_({index: chosen(decoder, index, 9) for index in (1, 2)})
    return share_(decoder, "1:2", rank=3)


def shallow(family: str) -> Decoder:
    decoder = share_(_made(family).copy(), "0:3", rank=4)
    decoder.keep_([1, 2, 3])
    return decoder


def single(family: str) -> Decoder:
    decoder = share_(_made(family).copy(), "0:3", rank=4)
    decoder.keep_([1, 3])
    return decoder


def after_tie(family: str) -> Decoder:
    decoder = _made(family).copy()
    Merge(groups="0-1,2-3", align="none", tie=True).apply(decoder, None)
    return share_(decoder, "0:2", rank=2)


def masked(family: str) -> Decoder:
    decoder = uniform(family)
    name, weight = next((n, p) for n, p in decoder.model.named_parameters() if "attn" in n and n.endswith("weight"))
    hold_(decoder, {name: sparsify(weight)})
    return decoder


Build = Callable[[str], Decoder]
MANY = (anchored, allotted, without_delta, twice, narrow, shallow, single, after_tie, masked)
KINDS = pytest.mark.parametrize(
    ("build", "family"),
    [(build, family) for build in (uniform, lacking) for family in FAMILY_NAMES]
    + [(build, family) for build in MANY for family in ("gpt2", "qwen2")],
)


@KINDS
def test_compact_it_comes_back_bit_for_bit(build: Build, family: str, tmp_path: Path) -> None:
    decoder = build(family)
    model_of(decoder).save(tmp_path / "saved", format="compact")
    loaded = load(tmp_path / "saved").decoder
    assert torch.equal(logits(loaded), logits(decoder))
    assert hash_weights(loaded.model) == hash_weights(decoder.model)
    assert ranks(loaded) == ranks(decoder)
    assert loaded.size() == decoder.size()
    assert loaded.removed_parts == decoder.removed_parts
    assert loaded.d_ffn == decoder.d_ffn
    assert list(held(loaded)) == list(held(decoder))
    if build in (uniform, lacking, single):
        assert continued(loaded) == continued(decoder, use_cache=False)
    owners = [{id(module.weight): None for module in factored(each).values()} for each in (loaded, decoder)]
    assert len(owners[0]) == len(owners[1])
    stored = load_file(tmp_path / "saved" / COMPACT_WEIGHTS)
    kept = sum(tensor.numel() for name, tensor in stored.items() if not name.endswith("#mask"))
    assert kept == (decoder.size().parameters if build is not masked else decoder.size().nonzero)
    model_of(loaded).save(tmp_path / "again", format="compact")
    assert (tmp_path / "again" / COMPACT_WEIGHTS).read_bytes() == (tmp_path / "saved" / COMPACT_WEIGHTS).read_bytes()


@KINDS
def test_dense_it_is_a_plain_model(build: Build, family: str, tmp_path: Path) -> None:
    decoder = build(family)
    before, known = hash_weights(decoder.model), ranks(decoder)
    model_of(decoder).save(tmp_path / "saved")
    assert hash_weights(decoder.model) == before
    assert ranks(decoder) == known
    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values())
    assert (reloaded(input_ids=token_ids()).logits - logits(decoder)).abs().max() < 1e-5
    loaded = load(tmp_path / "saved").decoder
    assert ranks(loaded) == {}
    assert json.loads((tmp_path / "saved" / MANIFEST).read_text())["ranks"] == {}
    assert hash_weights(loaded.model) == hash_weights(multiplied_out(decoder).model) or build is after_tie
    assert (logits(loaded) - logits(decoder)).abs().max() < 1e-5
    Prune(sparsity=0.5, parts="ffn").apply(loaded, None)  # which is refused where FFNs have deltas


def test_a_process_that_never_imports_layerfold_loads_the_dense_form_and_no_compact_one(tmp_path: Path) -> None:
    families = ("gpt2", "llama")
    for family in families:
        decoder = lacking(family)
        for form in FORMATS:
            model_of(decoder).save(tmp_path / family / form, format=form)
        torch.save((token_ids(), logits(decoder)), tmp_path / f"{family}.pt")
    script = f"""
import sys, torch
from transformers import AutoModelForCausalLM
for family in {families!r}:
    ids, expected = torch.load(family + ".pt")
    model = AutoModelForCausalLM.from_pretrained(family + "/dense")
    assert (model(input_ids=ids).logits - expected).abs().max() < 1e-5, family
    try:
        AutoModelForCausalLM.from_pretrained(family + "/compact")
    except ValueError as error:
        assert "model type `layerfold`" in str(error), error
    else:
        raise AssertionError("loaded")
assert not any(name.startswith("layerfold") for name in sys.modules)
print("equal")
"""
    command = [sys.executable, "-I", "-c", script]  # -I: neither PYTHONPATH nor the current folder
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout == "equal\n", done.stderr


def test_the_base_is_stored_once(family: str, tmp_path: Path) -> None:
    decoder = uniform(family)
    model_of(decoder).save(tmp_path / "saved", format="compact")
    manifest = json.loads((tmp_path / "saved" / MANIFEST).read_text())
    shared = {name: owner for name, owner in manifest["aliases"].items() if ".mlp." in name}
    assert len(shared) == 2 * len(_made(family).blocks[0].ffn.matrices)
    assert all(".1.mlp." in owner and owner.endswith(".weight") for owner in shared.values())
    assert manifest["ranks"] == dict.fromkeys(ranks(decoder), 4)
    removed = _made(family).size().parameters - decoder.size().parameters
    assert bytes_on_disk(_made(family), "compact") - bytes_on_disk(decoder, "compact") > 4 * removed - 4000 > 0
    assert abs(bytes_on_disk(decoder, "dense") - bytes_on_disk(_made(family), "dense")) < 100


def test_half_precision_is_saved_in_half_precision_and_computed_in_float32(family: str, tmp_path: Path) -> None:
    decoder = _made(family).copy()
    decoder.model.to(torch.bfloat16)
    share_(decoder, "1:3", rank=4)
    model_of(decoder).save(tmp_path / "saved", format="compact")
    model = load(tmp_path / "saved")
    loaded = model.decoder
    assert model.stored.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    loaded.model.to(torch.bfloat16)
    assert hash_weights(loaded.model) == hash_weights(decoder.model)
    assert ranks(loaded) == ranks(decoder)


# Damage


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deltas")
    model_of(uniform("llama")).save(folder / "compact", format="compact")
    return folder


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda known: known | {"model.layers.9.mlp.up_proj": 4}, r"is damaged: .*the model has no such matrix"),
        (lambda known: known | {"": 4}, r"is damaged: .*no such matrix"),
        (lambda known: known | {UP: 33}, r"is damaged: a delta of rank 33 .*accepted: 0 \.\.\. 32"),
        *(
            (lambda known, rank=rank: known | {UP: rank}, rf"is damaged: a delta of rank {rank!r} ")
            for rank in (-1, 4.0, True, None, "4")
        ),
        *((lambda known, wrong=wrong: wrong, "is damaged: .") for wrong in (None, 4, "4", [UP], [[UP, 4]])),
        (lambda known: known | {UP: 5}, r"cannot be read: .*size mismatch for model\.layers\.1\.mlp\.up_proj\.[ab]"),
        (lambda known: {}, r"cannot be read: .*Unexpected key"),
        (lambda known: known | {"model.layers.0.mlp.up_proj": 4}, r"cannot be read: .*Missing key"),
        (
            lambda known: {name: rank for name, rank in known.items() if name != UP},
            r"cannot be read: .*Unexpected key.*up_proj\.a",
        ),
    ],
)
def test_damaged_ranks_are_one_line(change: Any, said: str, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "compact", tmp_path / "saved")
    path = tmp_path / "saved" / MANIFEST
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"ranks": change(manifest["ranks"])}))
    with pytest.raises(ModelError, match=said) as caught:
        load(tmp_path / "saved")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"decoder": None}, {"decoder": {}}, {"decoder": {"model_type": "none"}}, None])
def test_a_damaged_configuration_is_one_line(change: Any, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "compact", tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    path.write_text(json.dumps(change if change is None else json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match="cannot be") as caught:
        load(tmp_path / "saved")
    assert "\n" not in str(caught.value)


def test_weights_that_lack_a_delta_are_one_line(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "compact", tmp_path / "saved")
    weights, path = tmp_path / "saved" / COMPACT_WEIGHTS, tmp_path / "saved" / MANIFEST
    found = load_file(weights)
    del found[f"{UP}.b"]
    save_file(found, weights)
    manifest = json.loads(path.read_text())
    with pytest.raises(ModelError, match="is damaged: SHA-256"):
        load(tmp_path / "saved")
    manifest["sha256"] = hash_file(weights, json.dumps(manifest["aliases"], sort_keys=True))
    path.write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match=r"cannot be read: .*Missing key.*up_proj\.b") as caught:
        load(tmp_path / "saved")
    assert "\n" not in str(caught.value)
