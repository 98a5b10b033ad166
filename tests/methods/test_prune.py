"""Pruning weights: exactly as many zeros as the budget says, whatever the model, and they stay zeros."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning import CUT, EVERY, HEADS, NARROW, NEURONS, WAYS, blocks, fresh, prunable, prune, weights
from tiny import assert_equal, assert_masks_equal, logits, sparsify, unchanged, windows

from layerfold.calibration import Calibration
from layerfold.errors import InputError
from layerfold.methods import Drop, Merge, Prune
from layerfold.model.masks import held

WAY = pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way.values()))


@WAY
def test_the_budget_is_met_exactly_and_what_is_kept_stays(family: str, way: dict[str, Any]) -> None:
    decoder = fresh(family)
    before, total = weights(decoder), decoder.size().nonzero
    names = {each.name for each in blocks(decoder)}
    notes = prune(decoder, nonzero="84.13%", **way)
    assert decoder.size().nonzero == round(0.8413 * total)
    masks = held(decoder)
    assert masks.keys() == names
    for name, after in weights(decoder).items():
        if name not in names:
            assert torch.equal(after, before[name])
            continue
        assert torch.equal(masks[name], after != 0)
        if way["criterion"] != "sparsegpt":
            assert torch.equal(after[masks[name]], before[name][masks[name]])
    count, left = prunable(decoder)
    assert (notes["weights"], notes["zeros"]) == (count, count - left)
    assert list(notes["sparsity"]) == ["attention", "ffn"]
    assert "dense kernels" in notes["speed"]
    assert torch.isfinite(logits(decoder)).all()


@settings(max_examples=40, deadline=None)
@given(
    family=st.sampled_from(["gpt2", "qwen2", "llama"]),
    way=st.sampled_from([way for way in WAYS if way["criterion"] == "magnitude"]),
    parts=st.sampled_from(["attention", "ffn", "attention,ffn", "embeddings,head", "ffn,head", "head"]),
    levels=st.integers(1, 4),
    share=st.floats(0, 1),
    tied=st.booleans(),
)
def test_among_equal_weights_too(
    family: str, way: dict[str, Any], parts: str, levels: int, share: float, tied: bool
) -> None:
    decoder = fresh(family, **({"n_layer": 2} if family == "gpt2" else {"num_hidden_layers": 2}))
    if tied:
        Merge(n=2, align="none", tie=True).apply(decoder, None)
    with torch.no_grad():
        for parameter in decoder.model.parameters():
            parameter.mul_(levels / 0.4).round_()  # a few values, and zeros, biases and norms among them
    before, total = weights(decoder), decoder.size().nonzero
    everything = Prune(sparsity=0, parts=parts).resolved(decoder)
    least = total - (everything["weights"] - everything["zeros"])
    wanted = least + round(share * (total - least))
    prune(decoder, nonzero=wanted, parts=parts, **way)
    assert decoder.size().nonzero == wanted
    gone = {name: before[name][(after == 0) & (before[name] != 0)].abs() for name, after in weights(decoder).items()}
    left = {name: after[after != 0].abs() for name, after in weights(decoder).items() if name in held(decoder)}
    if way["scope"] == "global":
        most = max((float(each.max()) for each in gone.values() if len(each)), default=0)
        assert all(most <= float(each.min()) for each in left.values() if len(each))
    if way["scope"] != "row":
        pairs = [(gone[name], each) for name, each in left.items() if len(gone[name]) and len(each)]
        assert all(one.max() <= two.min() for one, two in pairs)


@WAY
def test_zeros_that_are_there_count(way: dict[str, Any]) -> None:
    decoder = fresh("gpt2")
    for index, each in enumerate(decoder.projections):
        if index % 3 == 0:
            sparsify(each.matrix.weight, index)  # some matrices have many more than others
    for block in decoder.blocks:
        block.ffn.up.bias.zero_()  # type: ignore[union-attr]
    weights_, _ = prunable(decoder)
    prune(decoder, sparsity=0.3, **way)
    assert prunable(decoder) == (weights_, weights_ - round(0.3 * weights_))
    already = {name: each == 0 for name, each in weights(decoder).items()}
    prune(decoder, sparsity=0.5, **way)
    assert prunable(decoder) == (weights_, weights_ // 2)
    after = weights(decoder)
    assert not any(after[name][zeros].any() for name, zeros in already.items())
    with unchanged(decoder):
        prune(decoder, sparsity=0.3, **way)
    assert Prune(sparsity=0.3).resolved(decoder) == Prune(sparsity=0.5).resolved(decoder)


@pytest.mark.parametrize("way", [*WAYS, *({"structure": "neurons"} | each for each in NARROW), HEADS, NEURONS], ids=str)
@pytest.mark.parametrize("kind", ["tied", "attention gone", "FFN gone", "both gone", "one block"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_is_left_of_a_model_is_pruned(family: str, kind: str, way: dict[str, Any]) -> None:
    depth = "n_layer" if family == "gpt2" else "num_hidden_layers"
    decoder = fresh(family, **{depth: 1 if kind == "one block" else 3})
    if kind == "tied":
        Merge(groups="0-1", align="none", tie=True).apply(decoder, None)
    if kind in ("attention gone", "both gone"):
        Drop(blocks="0-1", part="attention").apply(decoder, None)
    if kind in ("FFN gone", "both gone"):
        Drop(blocks="1-2", part="ffn").apply(decoder, None)
    size, widths, heads = decoder.size(), decoder.d_ffn, decoder.heads
    if "structure" in way:
        prune(decoder, sparsity=0.25, **way)
        assert decoder.size().parameters < size.parameters
        assert [width == 0 for width in decoder.d_ffn] == [width == 0 for width in widths]
        if way != HEADS:
            distinct = slice(1, None) if kind == "tied" else slice(None)
            assert sum(decoder.d_ffn[distinct]) == 0.75 * sum(widths[distinct])
            assert decoder.heads == heads
    else:
        prune(decoder, nonzero="80%", **way)
        assert decoder.size().nonzero == round(0.8 * size.nonzero)
        assert decoder.size().parameters == size.parameters
    assert torch.isfinite(logits(decoder)).all()
    if kind == "tied":
        one, two = (decoder.blocks[index].ffn.down.module for index in (0, 1))
        assert one.weight is two.weight
        assert getattr(one, "weight_mask", None) is getattr(two, "weight_mask", None)


@WAY
def test_both_ends_of_the_reachable_range(way: dict[str, Any]) -> None:
    decoder = fresh("gpt2")
    before, total = logits(decoder), decoder.size().nonzero
    outside = total - prunable(decoder)[1]
    for beyond in (total + 1, outside - 1, "100.1%", "0", "1B"):
        with pytest.raises(InputError, match=rf"nonzero .* accepted: {outside:,} \.\.\. {total:,}$"):
            Prune(nonzero=beyond, **way).resolved(decoder)
    for most in (total, "100%"):
        prune(decoder, nonzero=most, **way)
        assert torch.equal(logits(decoder), before)
    prune(decoder, nonzero=outside, **way)
    assert decoder.size().nonzero == outside
    assert prunable(decoder)[1] == 0
    assert torch.isfinite(logits(decoder)).all()
    with pytest.raises(InputError, match="accepted: "):
        Prune(nonzero=outside + 1, **way).resolved(decoder)


@pytest.mark.parametrize("way", EVERY, ids=str)
def test_pruning_nothing_is_the_identity(family: str, way: dict[str, Any]) -> None:
    if way.get("structure") == "2:4":
        return
    decoder = fresh(family)
    before, size = logits(decoder), decoder.size()
    for budget in ({"sparsity": 0}, {"nonzero": size.nonzero}):
        with unchanged(decoder):
            prune(decoder, **budget, **way)
        assert torch.equal(logits(decoder), before)
        assert decoder.size() == size


@pytest.mark.parametrize("way", EVERY, ids=str)
def test_the_same_settings_give_the_same_weights(way: dict[str, Any]) -> None:
    one, two = (fresh("gpt2") for _ in range(2))
    for decoder in (one, two):
        method = Prune(**({} if way.get("structure") == "2:4" else {"sparsity": 0.4}), **way)
        method.apply(decoder, Calibration(decoder, CUT) if method.needs_calibration else None)
    assert_equal(weights(one), weights(two))
    assert_masks_equal(held(one), held(two))


@pytest.mark.parametrize("way", [{"criterion": "sparsegpt"}, HEADS], ids=str)
def test_the_text_of_another_decoder_is_read_for_the_one_that_is_pruned(way: dict[str, Any]) -> None:
    base, narrow, again = (fresh("gpt2") for _ in range(3))
    for decoder in (narrow, again):
        decoder.keep_([0, 2, 3])
        Prune(sparsity=0.5, structure="neurons").apply(decoder, None)
    with unchanged(base):
        for decoder, text in ((narrow, Calibration(base, windows())), (again, Calibration(again, windows()))):
            Prune(sparsity=0.5, **way).apply(decoder, text)
    assert torch.equal(logits(again), logits(narrow))
