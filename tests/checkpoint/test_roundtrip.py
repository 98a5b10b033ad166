"""What is saved comes back exactly, in either form, whatever was done to the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import KINDS, OF_ALL_FAMILIES, Saved, by_transformers, close, made, manifest, model_of, with_tokenizer
from safetensors.torch import load_file
from tiny import FAMILY_NAMES, assert_masks_equal, continued, logits, sparsify, tiny, tiny_model, token_ids, tokenizer
from torch import Tensor
from transformers import AutoTokenizer

from layerfold.checkpoint.compact import COMPACT_WEIGHTS
from layerfold.checkpoint.load import load
from layerfold.checkpoint.save import (
    FORMATS,
    MASKS,
    bytes_on_disk,
    hash_weights,
    read_manifest,
    read_training_,
    write_dense,
)
from layerfold.errors import InputError, ModelError
from layerfold.methods import Prune
from layerfold.model.decoder import Decoder
from layerfold.model.deltas import factored, multiplied_out, ranks
from layerfold.model.masks import held, hold_

KIND = pytest.mark.parametrize(("kind", "family"), KINDS)
FORMAT = pytest.mark.parametrize("form", FORMATS)
ZEROS = "not zero where the model has nothing$"
TOLD: dict[str, dict[str, Any]] = {
    "lacking": {"removed": {"attention": [0, 3], "ffn": [1, 3]}},
    "widths": {"d_ffn": {"0": 30, "1": 7, "3": 1}},
    "of one width": {"d_ffn": {}},
    "heads": {"heads": {"0": 1, "3": 1}},
}


def weights_in(folder: Path) -> dict[str, Tensor]:
    file = folder / COMPACT_WEIGHTS
    return load_file(file if file.exists() else folder / "model.safetensors")


@KIND
def test_compact_it_comes_back_bit_for_bit(kind: str, family: str, saved: Saved, tmp_path: Path) -> None:
    decoder, folder = made(kind, family).decoder, saved(kind, family, "compact")
    loaded = load(folder).decoder
    assert torch.equal(logits(loaded), logits(decoder))
    assert hash_weights(loaded.model) == hash_weights(decoder.model)
    assert loaded.size() == decoder.size()
    for each in (loaded.d_ffn, loaded.heads, loaded.removed_parts, ranks(loaded)):
        assert each in (decoder.d_ffn, decoder.heads, decoder.removed_parts, ranks(decoder))
    assert loaded.blocks_by_ffn == decoder.blocks_by_ffn
    assert_masks_equal(held(loaded), held(decoder))
    owners = [len({id(module.weight) for module in factored(each).values()}) for each in (loaded, decoder)]
    assert owners[0] == owners[1]
    assert TOLD.get(kind, {}).items() <= manifest(folder).items()
    assert continued(loaded) == continued(decoder, use_cache=False)
    stored = weights_in(folder)
    kept = sum(tensor.numel() for name, tensor in stored.items() if not name.endswith("#mask"))
    assert kept == (decoder.size().nonzero if held(decoder) else decoder.size().parameters)
    assert not any(name.startswith(decoder.removed_prefixes) for name in stored)
    model_of(loaded).save(tmp_path, format="compact", overwrite=True)
    assert (tmp_path / COMPACT_WEIGHTS).read_bytes() == (folder / COMPACT_WEIGHTS).read_bytes()


@KIND
def test_dense_it_is_a_plain_model_and_comes_back(kind: str, family: str, saved: Saved, tmp_path: Path) -> None:
    decoder, folder = made(kind, family).decoder, saved(kind, family, "dense")
    # What deltas are multiplied out to is rounded, and zeros in the place of neurons and heads are summed up.
    exact = not ranks(decoder) and not manifest(folder)["d_ffn"] and not manifest(folder)["heads"]
    plain = by_transformers(folder)
    assert len(set(Decoder(plain).d_ffn)) == len(set(Decoder(plain).heads)) == 1
    found, expected = plain(input_ids=token_ids()).logits, logits(decoder)
    assert torch.equal(found, expected) if exact else close(found, expected)
    loaded = load(folder).decoder
    assert ranks(loaded) == manifest(folder)["ranks"] == {}
    assert (loaded.d_ffn, loaded.heads) == (decoder.d_ffn, decoder.heads)
    assert loaded.removed_parts == decoder.removed_parts
    assert_masks_equal(held(loaded), held(decoder))
    assert len(loaded.blocks_by_ffn) == loaded.n_blocks - len(loaded.removed_parts["ffn"]), "no FFN is tied"
    whole = tiny_model(family).state_dict()
    gone = {name: each for name, each in weights_in(folder).items() if name.startswith(decoder.removed_prefixes)}
    assert not any(tensor.any() for tensor in gone.values())
    assert kind != "lacking" or all(tensor.shape == whole[name].shape for name, tensor in gone.items())
    assert bool(gone) == bool(decoder.removed_prefixes)
    if "tie" in kind:  # copied: another model to weigh
        assert close(logits(loaded), expected)
        return
    assert hash_weights(loaded.model) == hash_weights(multiplied_out(decoder).model)
    assert loaded.size() == multiplied_out(decoder).size()
    if family == "gpt2":  # the compact form of all families generates
        assert continued(loaded) == continued(loaded, use_cache=False)
    if ranks(decoder):
        Prune(sparsity=0.5, parts="ffn").apply(loaded, None)  # which is refused where FFNs have deltas
        return
    assert torch.equal(logits(loaded), expected)
    model_of(loaded).save(tmp_path, format="compact", overwrite=True)
    compact = saved(kind, family, "compact")
    assert (tmp_path / COMPACT_WEIGHTS).read_bytes() == (compact / COMPACT_WEIGHTS).read_bytes()


@pytest.mark.parametrize("kind", OF_ALL_FAMILIES)
def test_saving_leaves_the_model_as_it_was(kind: str, tmp_path: Path) -> None:
    model = made(kind, "llama")
    before, known, size = hash_weights(model.decoder.model), ranks(model.decoder), model.decoder.size()
    for form in FORMATS:
        model.save(tmp_path / form, format=form)
    assert (hash_weights(model.decoder.model), ranks(model.decoder), model.decoder.size()) == (before, known, size)


@FORMAT
def test_tokenizer_and_provenance_come_back(form: Any, family: str, tmp_path: Path) -> None:
    model = with_tokenizer("tied", family).with_step({"name": "merge", "seed": 3})
    model.save(tmp_path / "saved", format=form)
    assert manifest(tmp_path / "saved") == read_manifest(tmp_path / "saved")
    assert manifest(tmp_path / "saved")["format"] == form
    loaded = load(tmp_path / "saved")
    assert loaded.provenance.base == "tiny"
    assert loaded.provenance.steps == ({"name": "merge", "seed": 3},)
    assert {"layerfold", "torch"} & loaded.provenance.versions.keys()
    expected = tokenizer()("naïve 映画").input_ids
    assert loaded.require_tokenizer()("naïve 映画").input_ids == expected
    if form == "dense":
        assert AutoTokenizer.from_pretrained(tmp_path / "saved")("naïve 映画").input_ids == expected
    assert read_manifest(tmp_path) is None
    model_of(model.decoder).save(tmp_path / "without")
    assert load(tmp_path / "without").tokenizer is None


# What the forms hold, and what they take


@pytest.mark.parametrize("kind", ["plain", "tied", "shared", "of one width", "masked"])
def test_a_form_takes_what_it_holds(kind: str, saved: Saved) -> None:
    family = "gpt2"
    decoder, plain = made(kind, family).decoder, made("plain", family).decoder
    sizes, whole = ({form: bytes_on_disk(each, form) for form in FORMATS} for each in (decoder, plain))
    for form in FORMATS:
        files = saved(kind, family, form).glob("*.safetensors")
        assert sum(file.stat().st_size for file in files) == sizes[form]
    fewer = plain.size().parameters - decoder.size().parameters
    assert whole["compact"] - sizes["compact"] >= 4 * fewer - 4000 * (kind == "shared")
    copies = kind in ("tied", "shared", "masked", "plain")
    assert abs(whole["dense"] - sizes["dense"] - (0 if copies else 4 * fewer)) < 2000
    assert (fewer > 10_000) == (kind not in ("plain", "masked"))


def test_the_base_of_deltas_is_stored_once(family: str, saved: Saved) -> None:
    told = manifest(saved("shared", family, "compact"))
    owners = {name: owner for name, owner in told["aliases"].items() if ".mlp." in name}
    assert len(owners) == 2 * len(made("plain", family).decoder.blocks[0].ffn.matrices)
    assert all(".1.mlp." in owner and owner.endswith(".weight") for owner in owners.values())
    assert told["ranks"] == dict.fromkeys(ranks(made("shared", family).decoder), 4)


def payload(path: Path) -> int:
    """Bytes of tensors in a file of safetensors: what follows the header, whose length stands in 8 bytes."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def test_a_masked_weight_takes_what_is_kept_of_it_and_a_bit_each(family: str, saved: Saved) -> None:
    kept = held(made("masked", family).decoder)
    values, bits = (sum(-(-mask.numel() * part // 8) for mask in kept.values()) for part in (32, 1))
    dropped = 4 * sum(int((~mask).sum()) for mask in kept.values())
    assert 0.45 < dropped / values < 0.55
    sizes = {kind: payload(saved(kind, family, "compact") / COMPACT_WEIGHTS) for kind in ("masked", "plain")}
    assert sizes["plain"] - sizes["masked"] == dropped - bits


def test_a_model_without_masks_says_nothing_of_them(saved: Saved) -> None:
    assert not (saved("plain", "gpt2", "dense") / MASKS).exists()
    assert "masks" not in manifest(saved("plain", "gpt2", "dense"))
    assert not any("#" in name for name in weights_in(saved("plain", "gpt2", "compact")))


@FORMAT
def test_a_negative_zero_and_a_kept_zero_come_back(form: Any, tmp_path: Path) -> None:
    decoder, name = made("plain", "gpt2").decoder, "transformer.h.1.mlp.c_fc.weight"
    weight = decoder.model.get_parameter(name)
    kept = sparsify(weight)
    with torch.no_grad():
        (row, column), (other, last) = torch.nonzero(kept)[:2].tolist()
        weight[row, column], weight[other, last] = 0.0, -0.0  # by chance, and free to become something else
        weight[tuple(torch.nonzero(~kept)[0])] = -0.0
    hold_(decoder, {name: kept})
    model_of(decoder).save(tmp_path / "saved", format=form)
    loaded = load(tmp_path / "saved")
    assert_masks_equal(held(loaded.decoder), {name: kept})
    found = loaded.decoder.model.get_parameter(name)
    assert found[row, column].signbit().item() is False
    assert found[other, last].signbit().item() is True
    assert loaded.sha256 == hash_weights(decoder.model)


@FORMAT
@pytest.mark.parametrize(("kind", "cast"), [("masked", False), ("masked", True), ("shared", False)])
def test_half_precision_is_saved_in_half_precision_and_computed_in_float32(
    kind: str, cast: bool, form: Any, tmp_path: Path
) -> None:
    model = made(kind, "llama")
    if cast:
        model.save(tmp_path / "saved", format=form, dtype=torch.bfloat16)
    model.decoder.model.bfloat16()
    if not cast:
        model.save(tmp_path / "saved", format=form)
    loaded = load(tmp_path / "saved")
    assert loaded.stored.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in loaded.decoder.model.parameters()} == {torch.float32}
    assert_masks_equal(held(loaded.decoder), held(model.decoder))
    loaded.decoder.model.bfloat16()
    expected = model.decoder if form == "compact" else multiplied_out(model.decoder)
    assert hash_weights(loaded.decoder.model) == hash_weights(expected.model)


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown format 'compat'; did you mean 'compact'"):
        made("plain", "gpt2").save(tmp_path / "saved", format="compat")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


# The hash of weights


def test_the_hash_of_weights_follows_names_shapes_and_values() -> None:
    model = tiny("gpt2").decoder.model
    before = hash_weights(model)
    assert before == hash_weights(tiny("gpt2").decoder.model) != hash_weights(tiny("gpt2", seed=1).decoder.model)
    model.transformer.h[0].ln_1.bias.data[0] += 1e-3
    assert hash_weights(model) != before


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


# The weights alone, as training writes and reads them


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("kind", ["plain", "collapsed", "tied", "lacking", "widths", "heads", "masked"])
def test_weights_that_were_written_are_read_into_another_of_the_structure(
    kind: str, family: str, tmp_path: Path
) -> None:
    model, other = made(kind, family).decoder.model, made(kind, family).decoder.model
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    write_dense(model, tmp_path / "weights")
    read_training_(other, tmp_path / "weights")
    assert hash_weights(other) == hash_weights(model), "ties and masks too"
    assert close(by_transformers(tmp_path / "weights")(token_ids()).logits, logits(Decoder(model)))


def test_weights_that_are_given_are_written_in_place_of_the_models_own(tmp_path: Path) -> None:
    model = made("tied", "gpt2").decoder.model
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    write_dense(model, tmp_path / "weights", state)
    other = made("tied", "gpt2").decoder.model
    read_training_(other, tmp_path / "weights")
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())
    assert torch.equal(model.state_dict()["lm_head.weight"] + 1, state["lm_head.weight"]), "and the model is let alone"


@pytest.mark.parametrize(
    ("of", "kind", "more", "said"),
    [
        ("plain", "lacking", None, ZEROS),
        ("widths", "plain", {0: 30, 1: 7, 2: 47, 3: 1}, r"48.* not .*47"),
        ("widths", "plain", {0: 29, 1: 7, 2: 48, 3: 1}, ZEROS),
        ("heads", "heads", None, ZEROS),
        ("plain", "masked", None, r"cannot be read: the weight '.*' is not zero everywhere that its mask says$"),
    ],
)
def test_weights_of_another_structure_are_refused(of: str, kind: str, more: Any, said: str, tmp_path: Path) -> None:
    write_dense(made(of, "qwen3").decoder.model, tmp_path / "weights")
    decoder = made(kind, "qwen3").decoder
    if more:
        decoder.keep_neurons_({index: torch.arange(width) for index, width in more.items()})
    if of == "heads":
        decoder.keep_heads_({1: torch.tensor([0])})
    before = hash_weights(decoder.model)
    with pytest.raises(ModelError, match=said):
        read_training_(decoder.model, tmp_path / "weights")
    assert hash_weights(decoder.model) == before or kind == "masked"
