"""Zeros that are to stay zeros: their masks go where the weights go."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import assert_masks_equal, halve_, logits, refused, sparsify, tiny, tiny_model, token_ids
from torch import Tensor
from transformers import AutoModelForCausalLM

from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import Model
from layerfold.checkpoint.save import FORMATS, hash_weights
from layerfold.errors import InputError
from layerfold.methods import Merge
from layerfold.model.decoder import Decoder
from layerfold.model.masks import held, hold_, pack, unpack

FORMAT = pytest.mark.parametrize("form", FORMATS)
UP = "transformer.h.{}.mlp.c_fc.weight"


# Bits


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple), st.integers(0, 2**32), st.booleans())
def test_a_mask_is_its_bits_again(shape: tuple[int, ...], seed: int, turned: bool) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask = mask.transpose(0, -1) if turned else mask
    bits = pack(mask)
    assert bits.dtype == torch.uint8
    assert bits.shape == (math.ceil(mask.numel() / 8),)
    assert torch.equal(unpack(bits, tuple(mask.shape)), mask)


@pytest.mark.parametrize(
    ("bits", "shape"),
    [
        (torch.zeros(2, dtype=torch.uint8), (2, 4)),
        (torch.zeros(2, dtype=torch.uint8), (3, 6)),
        (torch.zeros(0, dtype=torch.uint8), (1,)),
        (torch.zeros(1, dtype=torch.bool), (2, 4)),
        (torch.zeros(1, 1, dtype=torch.uint8), (2, 4)),
    ],
)
def test_bits_of_another_shape_are_refused(bits: Tensor, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"bytes of bits for a mask of shape \(.*; accepted: [123]$"):
        unpack(bits, shape)


def test_bits_are_filled_up_with_zeros() -> None:
    assert pack(torch.ones(3, 3, dtype=torch.bool)).tolist() == [255, 128]
    assert pack(torch.tensor([False, True, False])).tolist() == [64]


# On a decoder


def test_masks_are_held_and_change_nothing_that_is_computed_or_saved(family: str, tmp_path: Path) -> None:
    plain, decoder = (Decoder(tiny_model(family)) for _ in range(2))
    kept = halve_(decoder)
    assert len(kept) >= 4 * len(decoder.blocks)
    assert_masks_equal(held(decoder), kept)
    plain.model.load_state_dict(decoder.model.state_dict())  # strict: the names are the same
    assert held(plain) == {}
    assert torch.equal(logits(plain), logits(decoder))
    assert plain.size() == decoder.size()
    decoder.model.save_pretrained(tmp_path)
    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(reloaded(input_ids=token_ids()).logits, logits(decoder))
    hold_(decoder, {})
    assert_masks_equal(held(decoder), kept)


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        (UP.format(9), (32, 128), "a mask for 'transformer.h.9.mlp.c_fc.weight', and the model has no such weight"),
        ("transformer.h.0.mlp.c_fc.bias", (128,), "a mask for '.*c_fc.bias', and the model has no such weight"),
        ("", (1,), "a mask for '', and the model has no such weight"),
        (UP.format(0), (128, 32), r"'.*c_fc.weight' is \(128, 32\); accepted: \(32, 128\), its shape"),
        (UP.format(0), (4096,), r"is \(4096,\); accepted: \(32, 128\), its shape"),
        (UP.format(0), (32, 128), r"the weight '.*c_fc.weight' is not zero everywhere that its mask says"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(name: str, size: tuple[int, ...], said: str) -> None:
    decoder = tiny("gpt2").decoder
    with refused(InputError, f"{said}$"):
        hold_(decoder, {name: torch.zeros(size, dtype=torch.bool)})
    assert held(decoder) == {}


def test_of_masks_of_which_one_does_not_fit_none_is_held() -> None:
    decoder = tiny("gpt2").decoder
    kept = sparsify(decoder.model.get_parameter(UP.format(0)))
    with pytest.raises(InputError, match="not zero everywhere"):
        hold_(decoder, {UP.format(0): kept, UP.format(1): kept})
    assert held(decoder) == {}


def test_a_weight_that_was_written_into_is_held_no_more() -> None:
    decoder = tiny("gpt2").decoder
    kept = halve_(decoder)
    name, mask = next(iter(kept.items()))
    weight = decoder.model.get_parameter(name)
    with torch.no_grad():
        weight.masked_fill_(mask, 7.0)
        assert_masks_equal(held(decoder), kept)  # kept weights may be anything
        weight[tuple(torch.nonzero(~mask)[-1])] = float("nan")
    assert list(held(decoder)) == list(kept)[1:]
    model = Model(decoder, None, tiny("gpt2").provenance)
    assert model.sha256 == hash_weights(decoder.copy().model)


def test_masks_move_with_their_blocks_and_go_with_what_is_removed(family: str) -> None:
    decoder = tiny(family).decoder
    kept = halve_(decoder)
    decoder.keep_([0, 2, 3])
    decoder.remove_("attention", [1])
    decoder.remove_("ffn", [2])
    moved = {0: 0, 2: 1, 3: 2}
    expected = {}
    for name, mask in kept.items():
        path, _, rest = name.removeprefix(decoder.family.blocks + ".").partition(".")
        part = "ffn" if rest.startswith(decoder.family.ffn) else "attention"
        if int(path) in moved and (moved[int(path)], part) not in {(1, "attention"), (2, "ffn")}:
            expected[f"{decoder.family.blocks}.{moved[int(path)]}.{rest}"] = mask
    assert_masks_equal(held(decoder), expected)


@pytest.mark.parametrize("share", [False, True])
def test_a_copy_has_the_masks_and_keeps_them_apart(share: bool) -> None:
    decoder = tiny("gpt2").decoder
    kept = halve_(decoder)
    copied = decoder.copy(share=share)
    assert_masks_equal(held(copied), kept)
    same = copied.blocks[0].ffn.up.module.weight_mask is decoder.blocks[0].ffn.up.module.weight_mask
    assert same is share
    copied.keep_neurons_({1: torch.arange(40)})
    copied.keep_([1, 2])
    hold_(copied, {UP.format(1): torch.ones(32, 128, dtype=torch.bool)})
    assert held(copied)[UP.format(0)].shape == (32, 40)
    assert_masks_equal(held(decoder), kept)


def test_tied_ffns_have_one_mask_by_whatever_name(tmp_path: Path) -> None:
    for given_name in (1, 2, 3):
        model = tiny("gpt2")
        Merge(groups="1-3", align="none", tie=True).apply(model.decoder, None)
        kept = sparsify(model.decoder.model.get_parameter(UP.format(given_name)))
        hold_(model.decoder, {UP.format(given_name): kept})
        assert_masks_equal(held(model.decoder), {UP.format(1): kept})
        model.save(tmp_path / "saved", format="compact", overwrite=True)
        loaded = load(tmp_path / "saved").decoder
        assert loaded.size() == model.decoder.size()
        for decoder in (model.decoder, loaded):
            decoder.keep_([0, 3])  # without the block that the mask was named after
            assert_masks_equal(held(decoder), {UP.format(1): kept})


@pytest.mark.parametrize(("mine", "theirs"), [(0, 1), (1, 0)])
def test_an_ffn_that_is_tied_takes_the_others_masks(mine: int, theirs: int, family: str) -> None:
    for masked in (mine, theirs):
        decoder = tiny(family).decoder
        module = decoder.blocks[masked].ffn.up.module
        name = next(each.name for each in decoder.projections if each.matrix.module is module)
        kept = sparsify(decoder.model.get_parameter(name))
        hold_(decoder, {name: kept})
        decoder.blocks[mine].ffn.tie_(decoder.blocks[theirs].ffn)
        assert [*held(decoder).values()] == ([] if masked == mine else [pytest.approx(kept)])
        decoder.blocks[mine].ffn.own_()
        assert len(held(decoder)) == (0 if masked == mine else 2)


@FORMAT
def test_an_embedding_tied_to_the_head_has_one_mask(form: Any, tmp_path: Path) -> None:
    for family, name in (("gpt2", "lm_head.weight"), ("qwen2", "model.embed_tokens.weight")):
        model = tiny(family)
        table = model.decoder.model.get_input_embeddings().weight
        kept = sparsify(table)
        hold_(model.decoder, {name: kept})
        assert [mask is kept for mask in held(model.decoder).values()] == [True]
        model.save(tmp_path / family, format=form)
        loaded = load(tmp_path / family)
        assert_masks_equal(held(loaded.decoder), held(model.decoder))
        assert loaded.decoder.model.get_output_embeddings().weight_mask.equal(kept)
        assert loaded.sha256 == model.sha256


def test_masks_are_part_of_the_hash_and_without_them_nothing_changed() -> None:
    one, two, three, none = (tiny("gpt2").decoder for _ in range(4))
    for decoder in (one, two, three, none):
        halve_(decoder)
    none = Decoder(AutoModelForCausalLM.from_config(none.model.config))
    none.model.load_state_dict(one.model.state_dict())
    mask = held(two)[UP.format(0)].clone()
    mask[tuple(torch.nonzero(~mask)[0])] = True
    hold_(two, {UP.format(0): mask})
    hashes = [hash_weights(decoder.model) for decoder in (one, two, three, none)]
    assert hashes[0] == hashes[2]
    assert len(set(hashes)) == 3
    assert hash_weights(tiny("gpt2").decoder.model) == hash_weights(tiny("gpt2").decoder.copy().model)
