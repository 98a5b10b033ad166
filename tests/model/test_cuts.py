"""FFNs of fewer neurons and attentions of fewer heads: what they compute, renumbered, tied, masked and copied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import (
    BLOCKS,
    assert_masks_equal,
    chosen,
    continued,
    final,
    halve_,
    logits,
    step_through,
    tiny,
    token_ids,
    unchanged,
)
from torch import Tensor

from layerfold.checkpoint.save import hash_weights
from layerfold.errors import InputError
from layerfold.methods import Merge
from layerfold.model.decoder import Decoder
from layerfold.model.masks import held

SCALED = {"scale_attn_by_inverse_layer_idx": True}
NEURONS = {0: 20, 2: 1, 3: 47}
# Of GPT-2's four heads, and of the two groups of two query heads of the others.
HEADS: dict[str, dict[int, list[int]]] = {"gpt2": {0: [3], 2: [1, 2], 3: [0, 1, 3]}}
GROUPED: dict[int, list[int]] = {0: [1], 3: [0]}
UNIT = pytest.mark.parametrize("unit", ["neurons", "heads"])


def kept_of(decoder: Decoder, unit: str) -> dict[int, Tensor]:
    if unit == "neurons":
        return {index: chosen(decoder, index, width) for index, width in NEURONS.items()}
    kept = HEADS["gpt2"] if decoder.heads[0] == 4 else GROUPED
    return {index: torch.tensor(groups) for index, groups in kept.items()}


def counts(decoder: Decoder, unit: str) -> tuple[int, ...]:
    return decoder.d_ffn if unit == "neurons" else decoder.heads


def keep_(decoder: Decoder, unit: str, kept: dict[int, Tensor]) -> None:
    (decoder.keep_neurons_ if unit == "neurons" else decoder.keep_heads_)(kept)


def part(decoder: Decoder, unit: str, index: int) -> Any:
    block = decoder.blocks[index]
    return block.ffn if unit == "neurons" else block.attention


def output(decoder: Decoder, unit: str, index: int) -> Any:
    return decoder.blocks[index].output("ffn" if unit == "neurons" else "attention")


@UNIT
def test_what_is_kept_computes_as_if_the_others_never_reached_the_output(unit: str, family: str) -> None:
    decoder = tiny(family).decoder
    before, whole, silenced = logits(decoder), counts(decoder, unit), decoder.copy()
    kept, parameters = kept_of(decoder, unit), decoder.size().parameters
    gone = 0
    for index, units in kept.items():
        columns = output(silenced, unit, index).weight.T.unflatten(0, (whole[index], -1))
        lost = set(range(whole[index])) - set(units.tolist())
        columns[list(lost)] = 0
        gone += len(lost) * sum(each[0].numel() for each in part(decoder, unit, index).units)
    keep_(decoder, unit, kept)
    assert counts(decoder, unit) == tuple(len(kept.get(index, range(whole[index]))) for index in range(BLOCKS))
    assert torch.allclose(logits(decoder), logits(silenced), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(decoder), before, rtol=1e-2, atol=1e-2)
    assert parameters - decoder.size().parameters == gone
    assert continued(decoder) == continued(decoder, use_cache=False)


@UNIT
def test_all_of_them_in_another_order_change_no_logit(unit: str, family: str) -> None:
    decoder = tiny(family).decoder
    before, whole = logits(decoder), counts(decoder, unit)
    order = torch.randperm(whole[0], generator=torch.Generator().manual_seed(1))
    keep_(decoder, unit, dict.fromkeys(range(BLOCKS), order.flip(0)))
    assert (logits(decoder) - before).abs().max() < 1e-4
    keep_(decoder, unit, {})
    assert counts(decoder, unit) == whole


@UNIT
def test_a_unit_is_what_goes_with_it_in_the_order_of_the_indices(unit: str, family: str) -> None:
    decoder = tiny(family).decoder
    before = part(decoder, unit, 2).units
    order = torch.tensor([5, 0, 11, 3] if unit == "neurons" else [1])
    keep_(decoder, unit, {2: order})
    cut = part(decoder, unit, 2)
    assert all(torch.equal(now, was[order]) for now, was in zip(cut.units, before, strict=True))
    for matrix in cut.matrices if unit == "neurons" else (*cut.inputs, cut.output):  # as one of this size would be
        assert matrix.module.weight.is_contiguous()
        assert matrix.module.weight.requires_grad
        sizes = ("nf", "nx") if family == "gpt2" else ("out_features", "in_features")
        assert tuple(getattr(matrix.module, name) for name in sizes) == matrix.weight.shape
    bias, whole = (output(each, unit, 2).bias for each in (decoder, tiny(family).decoder))
    assert bias is whole is None or torch.equal(bias, whole)
    if unit == "neurons":
        inputs = torch.randn(3, decoder.d_model)
        assert torch.allclose(
            cut.neurons(inputs), tiny(family).decoder.blocks[2].ffn.neurons(inputs)[:, order], atol=1e-5
        )


@UNIT
def test_units_are_all_of_a_part_but_the_bias_of_its_output(unit: str, family: str) -> None:
    decoder = tiny(family).decoder
    viewed, written = part(decoder, unit, 1), output(decoder, unit, 1)
    inner = viewed.inputs if unit == "heads" else [each for each in viewed.matrices if each is not viewed.down]
    tensors = [written.weight, *(tensor for matrix in inner for tensor in matrix.tensors)]
    assert all(len(each) == counts(decoder, unit)[1] for each in viewed.units)
    # Every value is in some unit, once.
    found = torch.cat([each.flatten() for each in viewed.units]).sort().values
    assert torch.equal(found, torch.cat([each.flatten() for each in tensors]).sort().values)
    if unit == "neurons":  # live views
        for each in viewed.units:
            each[5] = 0
        assert not viewed.down.weight[:, 5].any()
        assert not viewed.up.weight[5].any()
        assert viewed.up.weight[6].all()


REFUSED = [
    ("neurons", {0: [1], 1: []}, "block 1 would keep no neuron; accepted: at least 1"),
    ("neurons", {0: [1], 3: [0]}, "block 3 has no FFN: it was dropped"),
    ("neurons", {0: [1], 1: [48]}, r"neurons to keep of block 1; accepted: distinct indices in 0 \.\.\. 47"),
    ("heads", {0: [1], 1: []}, r"heads to keep of block 1; accepted: distinct indices in 0 \.\.\. 1"),
    ("heads", {0: [1], 3: [0]}, "block 3 has no attention: it was dropped"),
    ("heads", {0: [1], 1: [2]}, r"heads to keep of block 1; accepted: distinct indices in 0 \.\.\. 1"),
    *(
        (unit, {0: [1], 1: bad}, f"{unit} to keep of block 1; accepted")
        for unit in ("neurons", "heads")
        for bad in ([-1], [0, 0])
    ),
    *(
        (unit, {0: [1], bad: [0]}, rf"blocks to keep {unit} of: \[0, {bad}\]; accepted: 0 \.\.\. 3")
        for unit in ("neurons", "heads")
        for bad in (4, -1)
    ),
]


@pytest.mark.parametrize(("unit", "kept", "said"), REFUSED)
def test_what_cannot_be_kept_is_refused_and_nothing_is_cut(unit: str, kept: dict[int, list[int]], said: str) -> None:
    decoder = tiny("llama").decoder
    decoder.remove_("ffn", [3])
    decoder.remove_("attention", [3])
    with unchanged(decoder), pytest.raises(InputError, match=f"^{said}"):
        keep_(decoder, unit, {index: torch.tensor(each, dtype=torch.long) for index, each in kept.items()})


@UNIT
def test_masks_are_cut_along(unit: str, family: str) -> None:
    decoder = tiny(family).decoder
    halve_(decoder)
    keep_(decoder, unit, kept_of(decoder, unit))
    weights, masks = dict(decoder.model.named_parameters()), held(decoder)
    assert len(masks) == BLOCKS * (4 if family == "gpt2" else 7)
    assert_masks_equal(masks, {name: weights[name] != 0 for name in masks})


@UNIT
@pytest.mark.parametrize("share", [False, True])
def test_a_copy_is_cut_alone(unit: str, share: bool, family: str) -> None:
    decoder = tiny(family).decoder
    before, whole, digest = logits(decoder), counts(decoder, unit), hash_weights(decoder.model)
    copied = decoder.copy(share=share)
    keep_(copied, unit, dict.fromkeys(range(BLOCKS), torch.tensor([0])))
    assert (counts(decoder, unit), counts(copied, unit)) == (whole, (1,) * BLOCKS)
    assert torch.equal(logits(decoder), before)
    assert hash_weights(decoder.model) == digest != hash_weights(copied.model)
    again = copied.copy(share=share)
    assert counts(again, unit) == counts(copied, unit)
    assert torch.equal(logits(again), logits(copied))


# FFNs that are one


def test_tied_ffns_are_cut_as_one(family: str) -> None:
    decoder, apart = tiny(family).decoder, tiny(family).decoder
    for each, tie in ((decoder, True), (apart, False)):
        Merge(groups="1-3", align="none", tie=tie).apply(each, None)
        neurons = chosen(each, 1, 9)
        each.keep_neurons_({index: neurons.clone() for index in (3, 1, 2)})
    assert decoder.blocks_by_ffn == [(0,), (1, 2, 3)]
    for tensors in zip(*(decoder.blocks[index].ffn.tensors() for index in (1, 2, 3)), strict=True):
        assert len({tensor.data_ptr() for tensor in tensors}) == 1
    assert decoder.d_ffn[1:] == (9, 9, 9)
    assert torch.equal(logits(decoder), logits(apart))
    ffn = sum(tensor.numel() for tensor in decoder.blocks[1].ffn.tensors())
    assert apart.size().parameters - decoder.size().parameters == 2 * ffn


@pytest.mark.parametrize("kept", [{1: [0, 1]}, {1: [0, 1], 2: [1, 0]}, {2: [0, 1], 1: [0, 2]}])
def test_tied_ffns_that_would_keep_different_neurons_are_refused(kept: dict[int, list[int]]) -> None:
    decoder = tiny("gpt2").decoder
    decoder.blocks[2].ffn.tie_(decoder.blocks[1].ffn)
    with pytest.raises(InputError, match=r"^blocks 1 and 2 share an FFN, and would keep different neurons$"):
        decoder.keep_neurons_({index: torch.tensor(neurons) for index, neurons in kept.items()})
    assert decoder.d_ffn == (128,) * BLOCKS


# Heads at another place, and of windows


@pytest.mark.parametrize("overrides", [{}, SCALED, SCALED | {"reorder_and_upcast_attn": True}], ids=str)
def test_a_block_of_fewer_heads_computes_the_same_at_another_place(overrides: dict[str, object]) -> None:
    decoder = tiny("gpt2", **overrides).decoder
    decoder.keep_heads_(kept_of(decoder, "heads"))
    by_hand = step_through(decoder, [0, 2, 3], token_ids())
    shared = decoder.copy(share=True)
    before = logits(shared)
    decoder.keep_([0, 2, 3])
    assert decoder.heads == (1, 2, 3)
    kept = final(decoder)
    assert torch.allclose(kept, by_hand, atol=1e-4)
    assert torch.equal(logits(shared), before)


def test_heads_of_windows_and_full_attention_beside_each_other_are_cut() -> None:
    types = ["full_attention", "sliding_attention"] * 2
    decoder = tiny("qwen2", layer_types=types, use_sliding_window=True, sliding_window=6).decoder
    silenced = decoder.copy()
    for index, group in ((0, 1), (1, 0)):
        silenced.blocks[index].attention.output.weight.T.unflatten(0, (2, -1))[1 - group] = 0
        decoder.keep_heads_({index: torch.tensor([group])})
    for each in (decoder, silenced):
        each.remove_("attention", [3])
    assert torch.allclose(logits(decoder), logits(silenced), rtol=1e-5, atol=1e-5)
    assert continued(decoder) == continued(decoder, use_cache=False)
