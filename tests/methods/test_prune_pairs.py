"""One pruning after another: what is zero stays zero, whatever criterion, structure and scope come first and second."""

from __future__ import annotations

import contextlib
from itertools import product
from typing import Any

import pytest
import torch
from pruning import CUT, fresh, prune
from tiny import BLOCKS, sparsify, windows

from layerfold.calibration import Calibration
from layerfold.errors import InputError
from layerfold.methods import Merge, Prune
from layerfold.methods.prune.method import CRITERIA, SCOPES, STRUCTURES
from layerfold.model.decoder import Decoder
from layerfold.model.masks import held


def accepted(*scopes: str | None) -> list[dict[str, Any]]:
    """Every pruning that there is, by the scopes that it admits among these; None is its own."""
    found: list[dict[str, Any]] = []
    for criterion, structure, scope in product(CRITERIA, STRUCTURES, scopes):
        way: dict[str, Any] = {"criterion": criterion, "structure": structure, "scope": scope}
        way |= {} if structure == "2:4" else {"sparsity": 0.25 if structure.startswith("neurons") else 0.6}
        with contextlib.suppress(InputError):
            Prune(**way)
            found.append(way)
    return found


FIRST = accepted(None)
SECOND = [way for way in accepted(None, *SCOPES) if way["scope"] or way["structure"] == "2:4"]
SHORT = windows(limit_tokens=40)
SMALL: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {"n_layer": 2, "n_embd": 16}),
    ("llama", {"num_hidden_layers": 2, "intermediate_size": 32}),
]


def done(decoder: Decoder, way: dict[str, Any]) -> None:
    method = Prune(**way)
    method.apply(decoder, Calibration(decoder, SHORT) if method.needs_calibration else None)


def zeros(decoder: Decoder) -> dict[str, torch.Tensor]:
    return {name: each == 0 for name, each in decoder.model.named_parameters() if name.endswith("weight")}


@pytest.mark.parametrize("first", FIRST, ids=lambda way: f"{way['criterion']}-{way['structure']}")
def test_no_pruning_fills_what_another_zeroed(first: dict[str, Any]) -> None:
    family, settings = SMALL[FIRST.index(first) % 2]
    pruned = fresh(family, **settings)
    done(pruned, first)
    for second in SECOND:
        decoder = pruned.copy()
        size, had, masks = decoder.size(), zeros(decoder), held(decoder)
        refused = ""
        try:
            done(decoder, second)
        except InputError as error:
            refused = str(error)
        if refused:
            assert "holds zeros that are to stay" in refused or "accepted: a multiple of 4" in refused
            assert decoder.size() == size
            continue
        assert decoder.size().nonzero <= size.nonzero, second
        assert masks.keys() <= held(decoder).keys(), second
        if not second["structure"].startswith("neurons"):
            after = zeros(decoder)
            assert all(after[name][mask].all() for name, mask in had.items()), second


@pytest.mark.parametrize("held_zeros", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_two_of_four_leaves_fewer_where_more_are_zero(family: str, held_zeros: bool) -> None:
    decoder = fresh(family)
    if held_zeros:
        prune(decoder, sparsity=0.75)
    else:
        for seed, each in enumerate(decoder.projections):
            sparsify(each.matrix.weight, seed)
    expected, weights = 0, 0
    for each in decoder.projections:
        fours = (each.matrix.weight != 0).reshape(-1, 4).sum(1)
        expected, weights = expected + int(fours.clamp_max(2).sum()), weights + 4 * len(fours)
    method = Prune(structure="2:4", criterion="sparsegpt")
    assert method.resolved(decoder)["zeros"] == weights - expected
    notes = prune(decoder, structure="2:4", criterion="sparsegpt")
    assert notes["zeros"] == weights - expected
    assert all((each.matrix.weight != 0).reshape(-1, 4).sum(1).max() <= 2 for each in decoder.projections)


# FFNs that several blocks share


def tied(family: str) -> Decoder:
    decoder = fresh(family)
    Merge(groups="0-2", align="none", tie=True).apply(decoder, None)
    return decoder


@pytest.mark.parametrize("edits", [True, False])
def test_moments_of_what_blocks_share_are_of_all_of_them(family: str, edits: bool) -> None:
    decoder = tied(family)
    alone: dict[str, Any] = {}
    Calibration(decoder, CUT).each_block(lambda _, each: alone.update(each), whole=True, edits=False, doing="")
    pooled: dict[int, dict[str, Any]] = {}
    Calibration(decoder, CUT).each_block(pooled.__setitem__, whole=True, edits=edits, doing="", pooled=True)
    assert list(pooled) == list(range(BLOCKS))
    paths = {each.matrix.module: each.name for each in decoder.projections}
    tokens = int(CUT.lengths.sum())
    for place, matrix in enumerate(decoder.blocks[0].ffn.matrices):
        name = paths[matrix.module]
        users = [paths[decoder.blocks[index].ffn.matrices[place].module] for index in range(3)]
        assert pooled[0][name].count == 3 * tokens
        expected = torch.stack([alone[user].products for user in users]).mean(0)
        assert (pooled[0][name].products - expected).abs().max() < 1e-4 * expected.abs().max()
        assert not any(user in each for user in users[1:] for each in pooled.values())
    for index, each in pooled.items():  # attention, and the FFN of the block that shares none
        for name, moments in each.items():
            if index == 3 or "mlp" not in name:
                assert torch.equal(moments.products, alone[name].products)


@pytest.mark.parametrize("scope", ["matrix", "row"])
def test_wanda_of_a_shared_ffn_is_its_definition_over_all_its_blocks(family: str, scope: Any) -> None:
    decoder = tied(family)
    before, squares = decoder.copy(), {}
    Calibration(decoder, CUT).each_block(
        lambda _, each: squares.update({name: m.squares for name, m in each.items()}),
        whole=False,
        edits=False,
        doing="",
    )
    prune(decoder, sparsity=0.5, criterion="wanda", scope=scope, parts="ffn")
    paths = {each.matrix.module: each.name for each in decoder.projections}
    up = [paths[decoder.blocks[index].ffn.up.module] for index in range(3)]
    # What the first of them reads is changed by no pruned block; what the others read is that of the model as it was.
    scores = before.blocks[0].ffn.up.weight.abs() * sum(squares[name] for name in up).sqrt()
    kept = decoder.blocks[0].ffn.up.weight != 0
    for row, keeps in zip(*((scores, kept) if scope == "row" else (scores[None], kept[None])), strict=True):
        assert row[~keeps].max() <= row[keeps].min() * (1 + 1e-4)


@pytest.mark.parametrize("way", [{"structure": "neurons", "sparsity": 0.3}, {"sparsity": 0.7}], ids=str)
def test_what_blocks_share_is_missed_in_each_of_them(way: dict[str, Any]) -> None:
    found = []
    for together in (True, False):
        decoder = fresh("gpt2")
        for block in decoder.blocks[1:]:
            block.module.load_state_dict(decoder.blocks[0].module.state_dict())
        for block in decoder.blocks:  # none adds anything that counts: all read the same
            block.ffn.down.weight.mul_(1e-6)
            block.attention.output.weight.mul_(1e-6)
            for matrix in (block.ffn.down, block.attention.output):
                assert matrix.bias is not None
                matrix.bias.zero_()
        for index in (1, 2) if together else ():
            decoder.blocks[index].ffn.tie_(decoder.blocks[0].ffn)
        prune(decoder, criterion="wanda", scope="global", parts="ffn", **way)
        found.append([int(decoder.blocks[index].ffn.up.weight.count_nonzero()) for index in (0, 3)])
    assert found[0][0] > found[0][1]
    assert abs(found[1][0] - found[1][1]) < 0.1 * found[1][0]
