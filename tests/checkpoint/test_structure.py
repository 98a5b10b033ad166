"""FFNs of fewer neurons: what they compute, tied, masked and copied."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import BLOCKS, assert_masks_equal, chosen, continued, halve_, logits, tiny

from layerfold.checkpoint.load import load
from layerfold.checkpoint.save import FORMATS, hash_weights
from layerfold.errors import InputError
from layerfold.methods import Merge
from layerfold.model.masks import held


def test_what_is_kept_computes_as_if_the_others_never_reached_the_output(family: str) -> None:
    zeroed, decoder = (tiny(family).decoder for _ in range(2))
    kept = {index: chosen(decoder, index, width) for index, width in ((0, 20), (2, 1), (3, 47))}
    for index, neurons in kept.items():
        down = zeroed.blocks[index].ffn.down.weight
        gone = torch.ones(down.shape[1], dtype=torch.bool)
        gone[neurons] = False
        down[:, gone] = 0
    whole = decoder.d_ffn[1]
    before = decoder.size().parameters
    decoder.keep_neurons_(kept)
    assert decoder.d_ffn == (20, whole, 1, 47)
    assert torch.allclose(logits(decoder), logits(zeroed), rtol=1e-5, atol=1e-5)
    assert not torch.equal(logits(decoder), logits(tiny(family).decoder))
    lost = sum(whole - width for width in (20, 1, 47))
    a_neuron = sum(tensor.numel() for tensor in tiny(family).decoder.blocks[0].ffn.tensors()) // whole
    assert before - decoder.size().parameters == lost * a_neuron
    assert continued(decoder) == continued(decoder, use_cache=False)


def test_neurons_stand_in_the_order_of_their_indices(family: str) -> None:
    whole, decoder = (tiny(family).decoder for _ in range(2))
    order = torch.tensor([5, 0, 11, 3])
    decoder.keep_neurons_({1: order})
    old, new = whole.blocks[1].ffn, decoder.blocks[1].ffn
    assert torch.equal(new.down.weight, old.down.weight[:, order])
    for name in ("up", "gate"):
        was, now = getattr(old, name), getattr(new, name)
        if was is not None:
            assert torch.equal(now.weight, was.weight[order])
            assert was.bias is None or torch.equal(now.bias, was.bias[order])
    assert old.down.bias is None or torch.equal(new.down.bias, old.down.bias)
    for matrix in new.matrices:  # as a module of this size would be
        assert matrix.module.weight.is_contiguous()
        assert matrix.module.weight.requires_grad
        sizes = ("nf", "nx") if family == "gpt2" else ("out_features", "in_features")
        assert tuple(getattr(matrix.module, name) for name in sizes) == matrix.weight.shape
    inputs = torch.randn(3, decoder.d_model)
    assert torch.allclose(new.neurons(inputs), old.neurons(inputs)[:, order], atol=1e-5)


def test_a_permutation_of_all_neurons_changes_no_logit(family: str) -> None:
    decoder = tiny(family).decoder
    before, width = logits(decoder), decoder.d_ffn[0]
    decoder.keep_neurons_({index: chosen(decoder, index, width) for index in range(BLOCKS)})
    assert (logits(decoder) - before).abs().max() < 1e-4
    decoder.keep_neurons_({})
    assert decoder.d_ffn == (width,) * BLOCKS


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ({0: [1], 1: []}, "block 1 would keep no neuron; accepted: at least 1"),
        ({0: [1], 3: [0]}, "block 3 has no FFN: it was dropped"),
        ({0: [1], 4: [0]}, r"blocks to keep neurons of: \[0, 4\]; accepted: 0 ... 3"),
        ({0: [1], -1: [0]}, r"blocks to keep neurons of: \[0, -1\]; accepted: 0 ... 3"),
        ({0: [1], 1: [48]}, r"neurons to keep of block 1; accepted: distinct indices in 0 ... 47"),
        ({0: [1], 1: [-1]}, "neurons to keep of block 1; accepted"),
        ({0: [1], 1: [3, 3]}, "neurons to keep of block 1; accepted"),
    ],
)
def test_what_cannot_be_kept_is_refused_and_nothing_is_cut(kept: dict[int, list[int]], said: str) -> None:
    decoder = tiny("llama").decoder
    decoder.remove_("ffn", [3])
    with pytest.raises(InputError, match=f"^{said}"):
        decoder.keep_neurons_({index: torch.tensor(neurons, dtype=torch.long) for index, neurons in kept.items()})
    assert decoder.d_ffn == (48, 48, 48, 0)


def test_tied_ffns_are_cut_as_one(family: str, tmp_path: Path) -> None:
    model, apart = tiny(family), tiny(family)
    for each, tie in ((model, True), (apart, False)):
        Merge(groups="1-3", align="none", tie=tie).apply(each.decoder, None)
        neurons = chosen(each.decoder, 1, 9)
        each.decoder.keep_neurons_({index: neurons.clone() for index in (3, 1, 2)})
    for tensors in zip(*(model.decoder.blocks[index].ffn.tensors() for index in (1, 2, 3)), strict=True):
        assert len({tensor.data_ptr() for tensor in tensors}) == 1
    assert model.decoder.d_ffn[1:] == (9, 9, 9)
    assert torch.equal(logits(model.decoder), logits(apart.decoder))
    ffn = sum(tensor.numel() for tensor in model.decoder.blocks[1].ffn.tensors())
    assert apart.decoder.size().parameters - model.decoder.size().parameters == 2 * ffn
    for form in FORMATS:
        model.save(tmp_path / form, format=form)
        loaded = load(tmp_path / form).decoder
        assert loaded.d_ffn == model.decoder.d_ffn
        assert torch.equal(logits(loaded), logits(model.decoder))
        assert (loaded.size() == model.decoder.size()) == (form == "compact")


@pytest.mark.parametrize("kept", [{1: [0, 1]}, {1: [0, 1], 2: [1, 0]}, {2: [0, 1], 1: [0, 2]}])
def test_tied_ffns_that_would_keep_different_neurons_are_refused(kept: dict[int, list[int]]) -> None:
    decoder = tiny("gpt2").decoder
    decoder.blocks[2].ffn.tie_(decoder.blocks[1].ffn)
    with pytest.raises(InputError, match=r"^blocks 1 and 2 share an FFN, and would keep different neurons$"):
        decoder.keep_neurons_({index: torch.tensor(neurons) for index, neurons in kept.items()})
    assert decoder.d_ffn == (128,) * BLOCKS


def test_masks_are_cut_along_with_neurons(family: str) -> None:
    decoder = tiny(family).decoder
    kept = halve_(decoder)
    order = torch.tensor([5, 0, 11])
    ffn = decoder.blocks[1].ffn
    modules = {matrix.module: matrix is ffn.down for matrix in ffn.matrices}
    names = {each.name: modules.get(each.matrix.module) for each in decoder.projections}
    decoder.keep_neurons_({1: order})
    expected = {}
    for name, mask in kept.items():
        dim = None if names[name] is None else int(names[name] != (family == "gpt2"))
        expected[name] = mask if dim is None else mask.index_select(dim, order)
    assert_masks_equal(held(decoder), expected)


@pytest.mark.parametrize("share", [False, True])
def test_a_copy_is_cut_alone(share: bool, family: str) -> None:
    decoder = tiny(family).decoder
    before, width, digest = logits(decoder), decoder.d_ffn[0], hash_weights(decoder.model)
    copied = decoder.copy(share=share)
    copied.keep_neurons_({index: torch.arange(3) for index in range(BLOCKS)})
    assert (decoder.d_ffn, copied.d_ffn) == ((width,) * BLOCKS, (3,) * BLOCKS)
    assert torch.equal(logits(decoder), before)
    assert hash_weights(decoder.model) == digest != hash_weights(copied.model)
    assert copied.copy(share=share).d_ffn == copied.d_ffn
    assert torch.equal(logits(copied.copy(share=share)), logits(copied))
