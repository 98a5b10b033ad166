"""What the loss would miss of each unit, beside plain autograd through the whole model and its logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import FAMILY_NAMES, halve_, tiny, unchanged, windows
from torch import Tensor
from torch.nn import functional

from layerfold.errors import InputError, ModelError
from layerfold.inference.sensitivity import sensitivities
from layerfold.memory import room
from layerfold.methods import Merge, Share
from layerfold.model.decoder import Decoder
from layerfold.text.windows import TokenWindows

CUT = windows(limit_tokens=100)
STRIDED = windows(limit_tokens=70, stride=20)
MIXED = {"layer_types": ["full_attention", "sliding_attention"] * 2, "use_sliding_window": True, "sliding_window": 6}


def plain(decoder: Decoder, cut: TokenWindows) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """The same by its definition, window by window without padding, everything held at once, in float64."""
    decoder = decoder.copy()
    model = decoder.model.double().eval()
    read = {("ffn", block.index): block.ffn.down.module for block in decoder.blocks if block.d_ffn}
    read |= {("attention", block.index): block.attention.output.module for block in decoder.blocks if block.heads}
    seen: dict[int, Tensor] = {}
    for module in read.values():
        module.register_forward_pre_hook(lambda module, inputs: seen.__setitem__(id(module), inputs[0]))
    neurons: dict[int, Any] = dict.fromkeys((index for part, index in read if part == "ffn"), 0)
    heads: dict[int, Any] = dict.fromkeys((index for part, index in read if part == "attention"), 0)
    apart = 0.0
    for ids, length, first in zip(cut.input_ids, cut.lengths.tolist(), cut.first_scored.tolist(), strict=True):
        logits = model(input_ids=ids[None, :length]).logits[0]
        nats = functional.cross_entropy(logits[first - 1 : -1], ids[first:length], reduction="sum")
        slopes = torch.autograd.grad(nats, [seen[id(module)] for module in read.values()])
        for (part, index), module, slope in zip(read, read.values(), slopes, strict=True):
            change = (seen[id(module)] * slope)[0].detach()
            if part == "ffn":
                neurons[index] = neurons[index] + change.square().sum(0)
            else:
                apart += float(change.square().sum())
                heads[index] = heads[index] + change.unflatten(1, (decoder.heads[index], -1)).sum(2).square().sum(0)
    together = sum(float(each.sum()) for each in heads.values())
    return neurons, {index: each * apart / together for index, each in heads.items()}


def assert_close(found: dict[int, Tensor], expected: dict[int, Tensor], rtol: float = 1e-3) -> None:
    assert sorted(found) == sorted(expected)
    for index, each in expected.items():
        assert found[index].dtype == torch.float64
        assert torch.allclose(found[index], each, rtol=rtol, atol=rtol * float(each.max())), index
        assert each.max() > each.min() or len(each) == 1  # no constant, of which any multiple would do


def assert_as_plain(decoder: Decoder, cut: TokenWindows = CUT) -> None:
    felt, (neurons, heads) = sensitivities(decoder, cut), plain(decoder, cut)
    assert_close(felt.neurons, neurons)
    assert_close(felt.heads, heads)


CASES: list[tuple[str, dict[str, Any]]] = [(family, {}) for family in FAMILY_NAMES]
CASES += [("gpt2", {"scale_attn_by_inverse_layer_idx": True}), ("qwen2", MIXED), ("gpt2", {"n_layer": 1})]


@pytest.mark.parametrize("cut", [CUT, STRIDED], ids=["disjoint", "strided"])
@pytest.mark.parametrize(("family", "overrides"), CASES)
def test_block_by_block_is_as_through_the_whole_model(
    family: str, overrides: dict[str, Any], cut: TokenWindows
) -> None:
    assert len(set(cut.lengths.tolist())) > 1
    assert_as_plain(tiny(family, **overrides).decoder, cut)


def test_tied_ffns_are_felt_in_each_of_their_blocks() -> None:
    decoder = tiny("llama").decoder
    Merge(groups="1-2", align="none", tie=True).apply(decoder, None)
    assert_as_plain(decoder)
    felt = sensitivities(decoder, CUT).neurons
    assert not torch.equal(felt[1], felt[2])


def test_what_is_gone_is_not_felt(family: str) -> None:
    decoder = tiny(family).decoder
    decoder.remove_("attention", [1, 3])
    decoder.remove_("ffn", [0, 1])
    felt = sensitivities(decoder, CUT)
    assert (sorted(felt.neurons), sorted(felt.heads)) == ([2, 3], [0, 2])
    assert_as_plain(decoder)
    decoder.remove_("attention", [0, 2])
    assert sensitivities(decoder, CUT).heads == {}


def test_what_is_narrow_and_masked_is_felt_as_it_is(family: str) -> None:
    decoder = tiny(family).decoder
    halve_(decoder)
    decoder.keep_heads_({1: torch.tensor([1])})
    decoder.keep_neurons_({0: torch.arange(5), 2: torch.tensor([3])})
    assert_as_plain(decoder)


@pytest.mark.parametrize("training", [False, True])
def test_the_decoder_stays_as_it_is(family: str, training: bool) -> None:
    decoder = tiny(family).decoder
    decoder.model.train(training)
    asked = {name: index % 2 == 0 for index, (name, _) in enumerate(decoder.model.named_parameters())}
    for name, parameter in decoder.model.named_parameters():
        parameter.requires_grad_(asked[name])
    modules = [type(module) for module in decoder.model.modules()]
    with unchanged(decoder):
        first, again = sensitivities(decoder, CUT), sensitivities(decoder, CUT)
    assert all(torch.equal(again.neurons[index], each) for index, each in first.neurons.items())
    assert {name: each.requires_grad for name, each in decoder.model.named_parameters()} == asked
    assert all(parameter.grad is None for parameter in decoder.model.parameters())
    assert [type(module) for module in decoder.model.modules()] == modules
    assert not any(module._forward_pre_hooks for module in decoder.model.modules())


def test_dropout_is_off() -> None:
    plain, dropping = (tiny("gpt2", **each).decoder for each in ({}, {"resid_pdrop": 0.9, "attn_pdrop": 0.9}))
    dropping.model.train()
    one, two = (sensitivities(decoder, CUT) for decoder in (plain, dropping))
    assert_close(two.neurons, one.neurons, 1e-6)
    assert_close(two.heads, one.heads, 1e-6)


@pytest.mark.parametrize("tokens", [1, 64])
def test_how_windows_are_batched_makes_no_difference(family: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny(family).decoder
    at_once = sensitivities(decoder, CUT)
    monkeypatch.setattr(room, "CPU_TOKENS", tokens)
    in_parts = sensitivities(decoder, CUT)
    assert_close(in_parts.neurons, at_once.neurons, 1e-4)
    assert_close(in_parts.heads, at_once.heads, 1e-4)


def test_what_pads_the_last_window_makes_no_difference() -> None:
    decoder = tiny("gpt2").decoder
    other = windows(limit_tokens=100)
    other.input_ids[-1, other.lengths[-1] :] = 99
    assert not torch.equal(other.input_ids, CUT.input_ids)
    one, two = sensitivities(decoder, CUT), sensitivities(decoder, other)
    assert_close(two.neurons, one.neurons, 1e-6)
    assert_close(two.heads, one.heads, 1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_are_refused(value: float) -> None:
    decoder = tiny("llama").decoder
    decoder.blocks[2].ffn.down.weight[0, 0] = value
    with pytest.raises(ModelError, match=r"^gradients at block \d's (ffn|attention) on the calibration text are not f"):
        sensitivities(decoder, CUT)
    assert all(parameter.requires_grad for parameter in decoder.model.parameters())


def test_shared_ffns_with_deltas_are_refused() -> None:
    decoder = tiny("gpt2").decoder
    Share(window="0:2", rank=2, align="none", init="svd").apply(decoder, None)
    with pytest.raises(InputError, match="low-rank delta"):
        sensitivities(decoder, CUT)
