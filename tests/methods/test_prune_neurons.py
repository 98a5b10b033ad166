"""Pruning neurons: smaller FFNs that compute what the neurons that are left compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pruning import CUT, HEADS, fresh, prune, weights
from pruning import NARROW as WAYS
from tiny import BLOCKS, continued, halve_, logits, neurons, sparsify, tiny, unchanged

from layerfold.checkpoint.load import load
from layerfold.checkpoint.model import Model
from layerfold.checkpoint.provenance import Provenance
from layerfold.errors import InputError
from layerfold.methods import Merge, Prune
from layerfold.model.decoder import Decoder
from layerfold.model.masks import held

WAY = pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way.values()))


def narrow(decoder: Decoder, **changes: Any) -> dict[str, Any]:
    return prune(decoder, structure="neurons", **changes)


def weight_of_a_neuron(decoder: Decoder, index: int = 0) -> int:
    """How many parameters go with one neuron."""
    ffn = decoder.blocks[index].ffn
    return sum(each[0].numel() for each in ffn.tensors()[: -2 if ffn.down.bias is not None else -1]) + decoder.d_model


def removed(before: Decoder, after: Decoder, index: int) -> list[int]:
    """Which of a block's neurons are gone, by their rows of `up`, which no method changes."""
    old, new = (decoder.blocks[index].ffn.up.weight for decoder in (before, after))
    return [i for i, row in enumerate(old) if not (row == new).all(1).any()]


def rated(decoder: Decoder, index: int, criterion: str, x: np.ndarray) -> np.ndarray:
    """A block's neurons by a criterion's definition, from the activations x, (tokens, d_ffn)."""
    ffn = decoder.blocks[index].ffn
    down = ffn.down.weight.double().numpy()
    if criterion == "magnitude":
        inner = [each.weight.double().numpy() for each in ffn.matrices if each is not ffn.down]
        return np.sqrt(sum((each**2).sum(1) for each in inner) + (down**2).sum(0))
    if criterion == "wanda":
        return np.linalg.norm(down, axis=0) * np.linalg.norm(x, axis=0)
    if ffn.down.bias is not None:  # one more input, always 1, which makes up for the others too
        x = np.column_stack([x, np.ones(len(x))])
    h = x.T @ x / len(x)
    inverse = np.linalg.inv(h + 0.01 * np.diag(h).mean() * np.eye(len(h)))
    return (down**2).sum(0) / np.diag(inverse)[: down.shape[1]]


# What is left


@WAY
def test_the_budget_is_met_within_one_neuron(family: str, way: dict[str, Any]) -> None:
    decoder = fresh(family)
    size = decoder.size()
    method = Prune(nonzero="80%", structure="neurons", **way)
    resolved = method.resolved(decoder)
    notes = narrow(decoder, nonzero="80%", **way)
    one = weight_of_a_neuron(decoder)
    assert abs(decoder.size().nonzero - 0.8 * size.parameters) <= one / 2 + 1
    assert size.parameters - decoder.size().parameters == one * resolved["removed"]
    assert notes["neurons_left"] == list(decoder.d_ffn)
    assert sum(decoder.d_ffn) == resolved["neurons"] - resolved["removed"]
    assert min(decoder.d_ffn) >= 1
    if "scope" not in way:
        assert max(decoder.d_ffn) - min(decoder.d_ffn) <= 1
    if way == WAYS[0]:
        assert continued(decoder) == continued(decoder, use_cache=False)


@pytest.mark.parametrize("way", WAYS[:2] + WAYS[3:], ids=lambda way: "-".join(way.values()))
def test_removing_neurons_is_silencing_them(family: str, way: dict[str, Any]) -> None:
    decoder = fresh(family)
    silenced, before = decoder.copy(), decoder.copy()
    narrow(decoder, sparsity=0.4, **way)
    for index in range(BLOCKS):
        silenced.blocks[index].ffn.down.weight[:, removed(before, decoder, index)] = 0
    assert sum(len(removed(before, decoder, index)) for index in range(BLOCKS)) == round(0.4 * sum(before.d_ffn))
    assert (logits(decoder) - logits(silenced)).abs().max() < 1e-4


@WAY
def test_those_go_that_the_criterion_misses_least(family: str, way: dict[str, Any]) -> None:
    before = fresh(family)
    decoder, mixed = before.copy(), before.copy()
    narrow(decoder, sparsity=0.5, **way)
    everywhere: list[tuple[float, float]] = []
    for index in range(BLOCKS):
        # Where FFNs are pruned one by one, each sees what the pruned ones before it make.
        scores = rated(mixed, index, way["criterion"], *neurons(mixed, CUT, index))
        lost = removed(before, decoder, index)
        kept = [i for i in range(len(scores)) if i not in lost]
        everywhere.append((scores[lost].max(initial=0), scores[kept].min()))
        if "scope" not in way:
            assert len(lost) == len(kept)
            assert scores[lost].max() <= scores[kept].min() * (1 + 1e-3)
            mixed.blocks[index].ffn.keep_(torch.tensor(kept))
            mixed.blocks[index].ffn.copy_(decoder.blocks[index].ffn.tensors())
    assert "scope" not in way or max(g for g, _ in everywhere) <= min(k for _, k in everywhere) * (1 + 1e-4)


def test_the_refit_is_least_squares_of_what_the_ffn_gave(family: str) -> None:
    decoder = fresh(family)
    before = decoder.copy()
    (x,) = neurons(before, CUT, 0)
    narrow(decoder, sparsity=0.5, criterion="sparsegpt")
    kept = [i for i in range(x.shape[1]) if i not in removed(before, decoder, 0)]
    old, new = (each.blocks[0].ffn.down for each in (before, decoder))
    weight, fitted = old.weight.double().numpy(), new.weight.double().numpy()
    given, left, rows = x @ weight.T, x[:, kept], x[:, kept]
    start = weight[:, kept].T
    if old.bias is not None and new.bias is not None:  # one more input, always 1
        given = given + old.bias.double().numpy()
        rows = np.column_stack([left, np.ones(len(x))])
        start = np.vstack([start, old.bias.double().numpy()])
        fitted = np.column_stack([fitted, new.bias.double().numpy()])
    h = rows.T @ rows / len(x)
    damping = 0.01 * np.diag(h).mean() * np.eye(len(h))
    expected = np.linalg.solve(h + damping, rows.T @ given / len(x) + damping @ start)
    assert pytest.approx(expected, abs=1e-3 * np.abs(expected).max()) == fitted.T
    assert ((rows @ fitted.T - given) ** 2).mean() < 0.8 * ((rows @ start - given) ** 2).mean()
    untouched = weights(before)
    assert all(torch.equal(each, untouched[name]) for name, each in weights(decoder).items() if ".mlp." not in name)


# Limits


@WAY
def test_both_ends_of_the_reachable_range(way: dict[str, Any]) -> None:
    decoder = fresh("llama")
    size, one = decoder.size(), weight_of_a_neuron(decoder)
    least = size.nonzero - one * BLOCKS * 47
    for beyond in (size.nonzero + 1, least - 1, "101%", "10%"):
        with pytest.raises(InputError, match=rf"accepted: {least:,} \.\.\. {size.nonzero:,}$"):
            narrow(decoder, nonzero=beyond, **way)
    with pytest.raises(InputError, match=r"sparsity 0.999 leaves an FFN without neurons; accepted: 0 \.\.\. 0.979167$"):
        narrow(decoder, sparsity=0.999, **way)
    assert decoder.size() == size
    other = decoder.copy()
    narrow(decoder, nonzero=least, **way)
    narrow(other, sparsity=0.979167, **way)
    assert decoder.d_ffn == other.d_ffn == (1,) * BLOCKS
    assert decoder.size().nonzero == least
    assert torch.isfinite(logits(decoder)).all()
    narrow(decoder, sparsity=0, **way)
    with pytest.raises(InputError, match=rf"accepted: {least:,} \.\.\. {least:,}$"):
        narrow(decoder, nonzero=least - one, **way)


@WAY
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_tied_ffns_stay_one_and_count_once(family: str, way: dict[str, Any]) -> None:
    decoder = fresh(family)
    Merge(groups="1-2", align="none", tie=True).apply(decoder, None)
    parameters = decoder.size().parameters
    resolved = Prune(nonzero="80%", structure="neurons", **way).resolved(decoder)
    assert resolved["neurons"] == 3 * decoder.d_ffn[0]
    narrow(decoder, nonzero="80%", **way)
    one, two = (decoder.blocks[index].ffn for index in (1, 2))
    assert all(a.module.weight is b.module.weight for a, b in zip(one.matrices, two.matrices, strict=True))
    assert abs(decoder.size().nonzero - 0.8 * parameters) <= weight_of_a_neuron(decoder) / 2 + 1
    assert torch.isfinite(logits(decoder)).all()


def test_a_model_without_units_has_none_to_remove() -> None:
    decoder = fresh("qwen2")
    for part in ("ffn", "attention"):
        decoder.remove_(part, range(BLOCKS))
    for settings, said in (
        ({"structure": "neurons"}, "no FFN to remove neurons from"),
        ({"parts": "ffn"}, "no matrices to prune in parts 'ffn'"),
        (HEADS, "^the model has no FFN and no attention to remove neurons and heads from$"),
    ):
        with pytest.raises(InputError, match=said):
            prune(decoder, sparsity=0.1, **settings)


def test_an_ffn_of_zeros_has_nothing_to_count() -> None:
    decoder = fresh("qwen2")
    for tensor in (tensor for block in decoder.blocks for tensor in block.ffn.tensors()):
        tensor.zero_()
    left = decoder.size().nonzero
    narrow(decoder, nonzero=left)
    assert decoder.size().nonzero == left
    with pytest.raises(InputError, match=rf"accepted: {left:,} \.\.\. {left:,}$"):
        narrow(decoder, nonzero=left - 1)
    narrow(decoder, sparsity=0.5)
    assert decoder.d_ffn == (24,) * BLOCKS


@pytest.mark.parametrize("scope", ["matrix", "global"])
def test_neurons_that_hold_zeros_are_not_worth_the_same(scope: Any) -> None:
    decoder = fresh("gpt2")
    decoder.blocks[1].ffn.up.bias[::2] = 0  # type: ignore[index]
    budget = int(0.8 * decoder.size().nonzero)
    narrow(decoder, nonzero=budget, scope=scope)
    assert abs(decoder.size().nonzero - budget) <= weight_of_a_neuron(decoder)
    sparsify(decoder.blocks[0].ffn.up.weight)
    with pytest.raises(InputError, match=r"some of which hold many more zeros than others; accepted: sparsity$"):
        narrow(decoder, nonzero=budget // 2, scope=scope)
    narrow(decoder, sparsity=0.1, scope=scope)


@WAY
def test_zeros_that_are_to_stay_are_cut_with_the_neurons_or_refused(way: dict[str, Any]) -> None:
    decoder = fresh("llama")
    halve_(decoder)
    if way["criterion"] == "sparsegpt":  # its refit would fill them
        said = r"refits the FFN of block 0, .* accepted: magnitude, wanda"
        with unchanged(decoder), pytest.raises(InputError, match=said):
            narrow(decoder, sparsity=0.5, **way)
        return
    narrow(decoder, sparsity=0.5, **way)
    masks = held(decoder)
    assert len(masks) == 7 * BLOCKS
    assert all(torch.equal(mask, weights(decoder)[name] != 0) for name, mask in masks.items())


@pytest.mark.parametrize(("form", "scope"), [("dense", "global"), ("compact", "matrix")])
def test_ffns_of_different_widths_come_back(family: str, form: Any, scope: Any, tmp_path: Path) -> None:
    model = tiny(family)
    narrow(model.decoder, sparsity=0.3, scope=scope)
    narrow(model.decoder, sparsity=0.1, scope=scope)
    Model(model.decoder, model.tokenizer, Provenance("tiny")).save(tmp_path / "saved", format=form)
    loaded = load(tmp_path / "saved").decoder
    assert loaded.d_ffn == model.decoder.d_ffn
    assert torch.equal(logits(loaded), logits(model.decoder))


def test_a_choice_over_all_ffns_leaves_each_its_best() -> None:
    decoder = fresh("gpt2")
    for tensor in decoder.blocks[1].ffn.tensors():
        tensor.mul_(1e-3)
    best = rated(decoder, 1, "magnitude", np.zeros(0)).argmax()
    row = decoder.blocks[1].ffn.up.weight[best].clone()
    narrow(decoder, sparsity=0.3, scope="global")
    assert decoder.d_ffn[1] == 1
    assert torch.equal(decoder.blocks[1].ffn.up.weight[0], row)
