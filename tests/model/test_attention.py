"""Attentions of fewer heads: what they compute, numbered anew, masked and copied."""

from __future__ import annotations

import pytest
import torch
from tiny import BLOCKS, assert_masks_equal, continued, halve_, logits, step_through, tiny, token_ids
from torch import Tensor

from layerfold.checkpoint.save import hash_weights
from layerfold.errors import InputError
from layerfold.model.decoder import Decoder
from layerfold.model.masks import held

SCALED = {"scale_attn_by_inverse_layer_idx": True}
# Of GPT-2's four heads, and of the two groups of two query heads of the others.
KEPT: dict[str, dict[int, list[int]]] = {"gpt2": {0: [3], 2: [1, 2], 3: [0, 1, 3]}}
GROUPED: dict[int, list[int]] = {0: [1], 3: [0]}


def kept_of(family: str) -> dict[int, Tensor]:
    return {index: torch.tensor(groups) for index, groups in KEPT.get(family, GROUPED).items()}


def silence_(decoder: Decoder, kept: dict[int, Tensor]) -> Decoder:
    """Zero what the output matrices read of the other groups."""
    for index, groups in kept.items():
        attention = decoder.blocks[index].attention
        columns = attention.output.weight.T.unflatten(0, (attention.heads, -1))
        for group in set(range(attention.heads)) - set(groups.tolist()):
            columns[group] = 0
    return decoder


def whole(family: str) -> int:
    """The number of groups of heads of each block."""
    return 4 if family == "gpt2" else 2


def test_what_is_kept_computes_as_if_the_others_never_reached_the_output(family: str) -> None:
    decoder, kept = tiny(family).decoder, kept_of(family)
    assert decoder.heads == (whole(family),) * BLOCKS
    silenced = silence_(decoder.copy(), kept)
    before, heads = logits(decoder), list(decoder.heads)
    decoder.keep_heads_(kept)
    for index, groups in kept.items():
        heads[index] = len(groups)
    assert decoder.heads == tuple(heads)
    assert torch.allclose(logits(decoder), logits(silenced), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(decoder), before, rtol=1e-2, atol=1e-2)
    assert continued(decoder) == continued(decoder, use_cache=False)


def test_groups_in_another_order_change_no_logit(family: str) -> None:
    decoder = tiny(family).decoder
    before, order = logits(decoder), torch.arange(whole(family)).flip(0)
    decoder.keep_heads_(dict.fromkeys(range(BLOCKS), order))
    assert (logits(decoder) - before).abs().max() < 1e-4
    decoder.keep_heads_({})
    assert decoder.heads == (len(order),) * BLOCKS


def test_units_are_all_of_the_attention_but_what_no_head_has_alone(family: str) -> None:
    attention = tiny(family).decoder.blocks[1].attention
    tensors = [tensor for matrix in attention.inputs for tensor in matrix.tensors]
    assert all(len(unit) == attention.heads for unit in attention.units)
    expected = sum(tensor.numel() for tensor in tensors) + attention.output.weight.numel()
    assert sum(unit.numel() for unit in attention.units) == expected
    # Every value is in some unit, once.
    found = torch.cat([unit.flatten() for unit in attention.units]).sort().values
    assert torch.equal(found, torch.cat([each.flatten() for each in (*tensors, attention.output.weight)]).sort().values)


def test_a_unit_is_what_goes_with_its_group(family: str) -> None:
    decoder = tiny(family).decoder
    before, units = decoder.size().parameters, decoder.blocks[2].attention.units
    decoder.keep_heads_({2: torch.tensor([1])})
    left = decoder.blocks[2].attention.units
    assert all(torch.equal(now[0], was[1]) for now, was in zip(left, units, strict=True))
    assert before - decoder.size().parameters == (whole(family) - 1) * sum(unit[0].numel() for unit in units)


def test_units_of_an_ffn_are_live_and_all_of_it_but_the_bias_of_its_output(family: str) -> None:
    ffn = tiny(family).decoder.blocks[1].ffn
    bias = 0 if ffn.down.bias is None else ffn.down.bias.numel()
    assert sum(unit.numel() for unit in ffn.units) == sum(tensor.numel() for tensor in ffn.tensors()) - bias
    for unit in ffn.units:
        unit[5] = 0
    assert not any(unit[5].any() for unit in ffn.units)
    assert not ffn.down.weight[:, 5].any()
    assert not ffn.up.weight[5].any()
    assert ffn.up.weight[6].all()


def test_modules_are_as_ones_of_their_size_would_be(family: str) -> None:
    decoder = tiny(family).decoder
    decoder.keep_heads_({1: torch.tensor([1])})
    attention = decoder.blocks[1].attention
    for matrix in (*attention.inputs, attention.output):
        assert matrix.module.weight.is_contiguous()  # type: ignore[operator]
        assert matrix.module.weight.requires_grad
        sizes = ("nf", "nx") if family == "gpt2" else ("out_features", "in_features")
        assert tuple(getattr(matrix.module, name) for name in sizes) == matrix.weight.shape
    assert attention.output.bias is None or attention.output.bias.shape == (decoder.d_model,)


@pytest.mark.parametrize("overrides", [{}, SCALED, SCALED | {"reorder_and_upcast_attn": True}], ids=str)
def test_a_block_of_fewer_heads_computes_the_same_at_another_place(overrides: dict[str, object]) -> None:
    decoder = tiny("gpt2", **overrides).decoder
    decoder.keep_heads_(kept_of("gpt2"))
    by_hand = step_through(decoder, [0, 2, 3], token_ids())
    shared = decoder.copy(share=True)
    before = logits(shared)
    decoder.keep_([0, 2, 3])
    assert decoder.heads == (1, 2, 3)
    with torch.no_grad():
        kept = decoder.model.base_model(input_ids=token_ids(), use_cache=False).last_hidden_state
    assert torch.allclose(kept, by_hand, atol=1e-4)
    assert torch.equal(logits(shared), before)


def test_heads_of_windows_and_full_attention_beside_each_other_are_cut() -> None:
    mixed = {
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "use_sliding_window": True,
        "sliding_window": 6,
    }
    decoder = tiny("qwen2", **mixed).decoder
    kept = {0: torch.tensor([1]), 1: torch.tensor([0])}
    silenced = silence_(decoder.copy(), kept)
    decoder.keep_heads_(kept)
    decoder.remove_("attention", [3])
    silenced.remove_("attention", [3])
    assert torch.allclose(logits(decoder), logits(silenced), rtol=1e-5, atol=1e-5)
    assert continued(decoder) == continued(decoder, use_cache=False)


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ({0: [1], 1: []}, r"heads to keep of block 1; accepted: distinct indices in 0 \.\.\. 1"),
        ({0: [1], 1: [2]}, r"heads to keep of block 1; accepted: distinct indices in 0 \.\.\. 1"),
        ({0: [1], 1: [-1]}, "heads to keep of block 1; accepted"),
        ({0: [1], 1: [0, 0]}, "heads to keep of block 1; accepted"),
        ({0: [1], 3: [0]}, "block 3 has no attention: it was dropped"),
        ({0: [1], 4: [0]}, r"blocks to keep heads of: \[0, 4\]; accepted: 0 \.\.\. 3"),
        ({0: [1], -1: [0]}, r"blocks to keep heads of: \[0, -1\]; accepted: 0 \.\.\. 3"),
    ],
)
def test_what_cannot_be_kept_is_refused_and_nothing_is_cut(kept: dict[int, list[int]], said: str) -> None:
    decoder = tiny("llama").decoder
    decoder.remove_("attention", [3])
    digest = hash_weights(decoder.model)
    with pytest.raises(InputError, match=f"^{said}"):
        decoder.keep_heads_({index: torch.tensor(groups, dtype=torch.long) for index, groups in kept.items()})
    assert decoder.heads == (2, 2, 2, 0)
    assert hash_weights(decoder.model) == digest


def test_masks_are_cut_along_with_heads(family: str) -> None:
    decoder = tiny(family).decoder
    halve_(decoder)
    decoder.keep_heads_(kept_of(family))
    weights = dict(decoder.model.named_parameters())
    masks = held(decoder)
    assert len(masks) == BLOCKS * (4 if family == "gpt2" else 7)
    assert_masks_equal(masks, {name: weights[name] != 0 for name in masks})


@pytest.mark.parametrize("share", [False, True])
def test_a_copy_is_cut_alone(share: bool, family: str) -> None:
    decoder = tiny(family).decoder
    before, heads, digest = logits(decoder), decoder.heads, hash_weights(decoder.model)
    copied = decoder.copy(share=share)
    copied.keep_heads_(dict.fromkeys(range(BLOCKS), torch.tensor([0])))
    assert (decoder.heads, copied.heads) == (heads, (1,) * BLOCKS)
    assert torch.equal(logits(decoder), before)
    assert hash_weights(decoder.model) == digest != hash_weights(copied.model)
    assert copied.copy(share=share).heads == copied.heads
    assert torch.equal(logits(copied.copy(share=share)), logits(copied))
