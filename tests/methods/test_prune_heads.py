"""Pruning neurons and heads by one ranking, and neurons alone by the same."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from pruning import CUT, HEADS, NEURONS, fresh, prune
from tiny import BLOCKS, continued, halve_, logits, tiny

import layerfold
from layerfold.errors import InputError
from layerfold.evaluators.size import flops_per_token
from layerfold.inference.sensitivity import sensitivities
from layerfold.methods import Drop, Merge, Prune, Steps
from layerfold.methods.prune.units import removable, sublayers
from layerfold.model.decoder import Decoder
from layerfold.model.masks import held

SCOPES = ("global", "matrix")


def units(decoder: Decoder) -> int:
    """How many parameters go with neurons and heads."""
    return sum(int(each.sizes.sum()) for each in sublayers(decoder))


# Settings


def test_settings_resolve_to_a_number_of_parameters() -> None:
    decoder = fresh("gpt2")
    parameters, size = 4 * (128 * 65 + 4 * 1048), 60_320
    assert Prune(sparsity=0.3, **HEADS).resolved(decoder) == {
        **{"name": "prune", "criterion": "taylor", "structure": "neurons+heads", "scope": "global"},
        **{"parameters": parameters, "removed": round(0.3 * parameters)},
    }
    alike = [
        Prune(**settings, **HEADS).resolved(decoder)
        for settings in (
            {"sparsity": 1000 / parameters},
            {"nonzero": size - 1000},
            {"nonzero": size - 1000, "scope": "global"},
            {"nonzero": f"{size - 1000:,}", "parts": "ffn, attention"},
        )
    ]
    assert all(each == alike[0] for each in alike)
    assert alike[0]["removed"] == 1000
    assert json.loads(json.dumps(alike[0])) == alike[0]
    assert Prune(sparsity=0.3, **NEURONS).resolved(decoder)["scope"] == "matrix"


# Budgets


def test_a_share_of_the_parameters_of_units_goes(family: str) -> None:
    decoder, share = fresh(family), 0.5
    before, wanted = units(decoder), Prune(sparsity=share, **HEADS).resolved(decoder)["removed"]
    notes = prune(decoder, sparsity=share, **HEADS)
    assert wanted == round(share * before)
    assert 0 <= before - units(decoder) - wanted < 2000
    assert (notes["neurons_left"], notes["heads_left"]) == (list(decoder.d_ffn), list(decoder.heads))
    assert "every kernel profits" in notes["speed"]
    assert continued(decoder) == continued(decoder, use_cache=False)


@pytest.mark.parametrize("masked", [False, True])
def test_a_budget_of_what_is_not_zero_is_met_and_not_exceeded(family: str, masked: bool) -> None:
    decoder = fresh(family)
    if masked:
        halve_(decoder)
    budget = int(0.8 * decoder.size().nonzero)
    prune(decoder, nonzero=budget, **HEADS)
    assert 0 <= budget - decoder.size().nonzero < 200
    weights = dict(decoder.model.named_parameters())
    assert bool(held(decoder)) == masked
    assert all(torch.equal(mask, weights[name] != 0) for name, mask in held(decoder).items())


def test_both_ends_of_the_reachable_range() -> None:
    decoder = fresh("llama")
    size, most = decoder.size(), removable(sublayers(decoder))
    least = size.nonzero - most
    for beyond in (size.nonzero + 1, least - 1, "10%"):
        with pytest.raises(InputError, match=rf"accepted: {least:,} \.\.\. {size.nonzero:,}$"):
            prune(decoder, nonzero=beyond, **HEADS)
    with pytest.raises(InputError, match=r"sparsity 0.999 leaves an FFN without neurons; accepted: 0 \.\.\. 0.98"):
        prune(decoder, sparsity=0.999, **HEADS)
    assert decoder.size() == size
    prune(decoder, nonzero=least, **HEADS)
    assert (decoder.d_ffn, decoder.heads) == ((1,) * BLOCKS, (0,) * BLOCKS)
    assert decoder.size().nonzero <= least  # with the last head its norm goes, and the bias of the output
    assert torch.isfinite(logits(decoder)).all()


def test_the_largest_share_that_is_told_is_accepted(family: str) -> None:
    decoder = fresh(family)
    with pytest.raises(InputError) as caught:
        Prune(sparsity=0.9999, **HEADS).resolved(decoder)
    most = float(str(caught.value).rsplit(" ", 1)[1])
    found = sublayers(decoder)
    assert 0 <= removable(found) - Prune(sparsity=most, **HEADS).resolved(decoder)["removed"] <= 1


@pytest.mark.parametrize("part", ["attention", "ffn"])
def test_what_is_left_of_a_model_is_pruned(part: Any) -> None:
    decoder = fresh("gpt2")
    Drop(blocks="0-3", part=part).apply(decoder, None)
    before = units(decoder)
    prune(decoder, sparsity=0.5, **HEADS)
    assert units(decoder) <= before / 2
    assert not any(decoder.heads if part == "attention" else decoder.d_ffn)


def test_operations_are_those_of_the_heads_that_are_left() -> None:
    decoder = fresh("qwen3")
    whole = flops_per_token(decoder, 9)
    decoder.keep_heads_({1: torch.tensor([0])})
    # A group: two query heads of 16 channels, a key and a value head. Scores and sums over (1 + ... + 9) / 9 positions.
    matrices = 32 * (2 * 16) + 2 * 32 * 16 + (2 * 16) * 32
    assert whole - flops_per_token(decoder, 9) == 2 * matrices + 4 * (2 * 16) * 5


# Neurons alone


@pytest.mark.parametrize("scope", SCOPES)
def test_neurons_go_that_the_loss_misses_least(family: str, scope: str) -> None:
    decoder = fresh(family)
    Merge(groups="1-2", align="none", tie=True).apply(decoder, None)
    before, felt = decoder.copy(), sensitivities(decoder, CUT).neurons
    felt[1] = felt[2] = felt[1] + felt[2]
    notes = prune(decoder, sparsity=0.5, scope=scope, **NEURONS)
    width = before.d_ffn[0]
    assert notes["neurons_left"] == list(decoder.d_ffn)
    assert sum(decoder.d_ffn[index] for index in (0, 1, 3)) == 3 * width - round(0.5 * 3 * width)
    assert decoder.heads == before.heads
    lost, kept = [], []
    for index in (0, 1, 3):
        best = felt[index].argsort(descending=True)[: decoder.d_ffn[index]].sort().values
        assert torch.equal(decoder.blocks[index].ffn.up.weight, before.blocks[index].ffn.up.weight[best])
        ordered = felt[index].sort().values
        lost += ordered[: width - len(best)].tolist()
        kept += ordered[width - len(best) : -1].tolist()  # the best stays in any case
    if scope == "matrix":
        assert set(decoder.d_ffn) == {width // 2}
    else:
        assert max(lost) <= min(kept) * (1 + 1e-6)
        assert len(set(decoder.d_ffn)) > 1


@pytest.mark.parametrize("scope", SCOPES)
def test_neurons_alone_meet_a_budget(scope: str) -> None:
    decoder = fresh("gpt2")
    prune(decoder, nonzero=60_320 - 65 * 100, scope=scope, **NEURONS)
    assert decoder.size().nonzero == 60_320 - 65 * 100


# With other steps


@pytest.mark.parametrize("way", [HEADS, NEURONS], ids=["heads", "neurons"])
def test_what_is_left_is_repaired(way: dict[str, Any], study_corpus: str) -> None:
    text = {"corpus": study_corpus, "tokens": 300, "repair_tokens": 600}
    method = Steps((Drop(blocks="1"), Prune(sparsity=0.5, **way)))
    made = layerfold.compress(tiny("gpt2"), method, repair="refit+attention", **text)
    drop, pruned, repair = made.provenance.steps
    assert [step["method"]["name"] for step in (drop, pruned, repair)] == ["drop", "prune", "repair"]
    assert [each["block"] for each in repair["notes"]["repaired"]] == [0, 1, 2]
    assert all(each["repaired"] <= each["error"] for each in repair["notes"]["repaired"])
    alone = tiny("gpt2").decoder
    alone.keep_([0, 2, 3])
    assert pruned["method"] == Prune(sparsity=0.5, **way).resolved(alone)
    assert list(made.decoder.d_ffn) == pruned["notes"]["neurons_left"]
    if way == HEADS:
        assert list(made.decoder.heads) == pruned["notes"]["heads_left"]
        assert sum(made.decoder.heads) < 12
