"""Other methods in the benchmark of quality: what follows exactly from their papers' formulas."""

from __future__ import annotations

import functools
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import BLOCKS, CONTEXT, corpus, logits, prose, tiny, tokenizer
from torch import Tensor

from layerfold.checkpoint.model import Model
from layerfold.inference.scoring import window_nats
from layerfold.model.decoder import Decoder
from layerfold.model.matrix import Matrix
from layerfold.text.windows import TokenWindows, cut_windows

DEPTH = 6
RUN = (2, 3)


def _imported(*names: str) -> list[Any]:
    """Modules of the benchmarks' folder, which is on the path for as long as that takes."""
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return [import_module(name) for name in names]
    finally:
        sys.path.remove(folder)


peers, plan, quality = _imported("peers", "plan", "quality")
METHODS = {"layerfold": plan.OWN, **peers.PEERS}


@pytest.fixture(params=["gpt2", "qwen3"])
def family(request: pytest.FixtureRequest) -> str:
    """One whose matrices are transposed, and one that is gated, with heads of a width of their own."""
    name: str = request.param
    return name


@functools.cache
def text() -> TokenWindows:
    return cut_windows(corpus(*(prose(120, seed) for seed in range(4))), tokenizer(), context=CONTEXT)


@functools.cache
def texts() -> Any:
    return peers.Texts(text(), SimpleNamespace(windows=lambda model: text()))


def outputs(decoder: Decoder, index: int) -> list[Matrix]:
    found = [decoder.blocks[index].output(part) for part in ("attention", "ffn")]
    return [each for each in found if each is not None]


def model(family: str = "gpt2", blocks: int = DEPTH) -> Model:
    return tiny(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": blocks})


def idle(family: str, *indices: int) -> Model:
    """A model some of whose blocks add nothing."""
    made = model(family)
    for index in indices:
        for each in outputs(made.decoder, index):
            for tensor in each.tensors:
                tensor.zero_()
    return made


@torch.no_grad()
def states(decoder: Decoder) -> list[Tensor]:
    """What enters each block, and what leaves the last, from a plain forward pass: (tokens of text, d_model) each."""
    seen: list[Tensor] = []
    handles = [
        block.module.register_forward_hook(lambda _, inputs, out: seen.extend((inputs[0], out)))
        for block in decoder.blocks
    ]
    decoder.model(input_ids=text().input_ids)
    for handle in handles:
        handle.remove()
    real = torch.arange(CONTEXT) < text().lengths[:, None]
    return [each[real] for each in (*seen[::2], seen[-1])]


def test_distances_are_those_of_a_plain_forward_pass(family: str) -> None:
    made = model(family)
    entering = states(made.decoder)
    found = peers.distances(made.decoder, text())
    for one, two in ((0, 1), (1, 4), (3, DEPTH)):
        cosine = torch.cosine_similarity(entering[one], entering[two], dim=-1)
        assert float(found[one, two]) == pytest.approx(1 - float(cosine.mean()), abs=1e-5)


def test_a_block_that_adds_nothing_has_no_influence_and_goes_first(family: str) -> None:
    made = idle(family, 3)
    assert abs(float(peers.distances(made.decoder, text())[3, 4])) < 1e-6
    smaller = peers.block_influence(made, DEPTH - 1, texts())
    torch.testing.assert_close(logits(smaller.decoder), logits(made.decoder), atol=1e-4, rtol=0)


def test_greedy_scores_all_that_is_left_after_each_block(family: str) -> None:
    made = model(family)
    left = made
    for _ in range(2):
        each = [peers.without(left, (index,)) for index in range(left.decoder.n_blocks)]
        left = min(each, key=lambda one: window_nats(one.decoder, text()).sum())
    assert logits(peers.greedy(made, DEPTH - 2, texts()).decoder).equal(logits(left.decoder))


def test_a_linear_map_in_place_of_blocks_that_add_nothing_changes_nothing(family: str) -> None:
    made = idle(family, *RUN)
    found = peers.linear_map(made.decoder, text(), RUN[0], len(RUN))
    torch.testing.assert_close(found, torch.eye(made.decoder.d_model), atol=1e-5, rtol=0)
    smaller = peers.linear_in_place(made, DEPTH - len(RUN), texts())
    assert smaller.decoder.n_blocks == DEPTH - len(RUN)
    torch.testing.assert_close(logits(smaller.decoder), logits(made.decoder), atol=1e-4, rtol=0)


def test_a_linear_map_is_the_least_squares_solution(family: str) -> None:
    made, first, gone = model(family), 3, 2
    seen: list[Tensor] = []
    ffn = peers.ffn_module(made.decoder.blocks[first - 1])
    handle = ffn.register_forward_hook(lambda _, __, out: seen.append(out.detach()))
    entering = states(made.decoder)
    handle.remove()
    added = seen[0][torch.arange(CONTEXT) < text().lengths[:, None]].double()
    wanted = (entering[first + gone] - entering[first]).double() + added
    least = torch.linalg.lstsq(added, wanted).solution.T
    found = peers.linear_map(made.decoder, text(), first, gone).double()

    def error(change: Tensor) -> float:
        return float((added @ change.T - wanted).square().sum())

    assert error(least) <= error(found) < 1.001 * error(least)
    assert error(found) < error(torch.eye(len(found), dtype=torch.float64))


def test_a_folded_map_is_one_that_is_applied(family: str) -> None:
    down = model(family).decoder.blocks[0].ffn.down
    inputs = torch.randn(5, down.weight.shape[1], generator=torch.Generator().manual_seed(0))
    change = torch.randn(len(down.weight), len(down.weight), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        applied = down.module(inputs) @ change.T
        peers.fold_(down, change)
        torch.testing.assert_close(down.module(inputs), applied, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kept", [5, 4, 3, 1])
def test_averaging_leaves_as_many_blocks_as_asked_for(family: str, kept: int) -> None:
    assert peers.averaging(model(family), kept, texts()).decoder.n_blocks == kept


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kept", [BLOCKS, BLOCKS - 2])
def test_no_method_exceeds_its_budget_or_touches_the_base(family: str, method: str, kept: int) -> None:
    made = model(family, BLOCKS)
    was = made.decoder.copy()
    smaller = METHODS[method].smaller(made, kept, texts())
    assert logits(made.decoder).equal(logits(was))
    if smaller is not None:
        size = smaller.decoder.size()
        held = size.nonzero if METHODS[method].zeros else size.parameters
        assert held <= peers.budget(made.decoder, kept)
        assert logits(smaller.decoder).isfinite().all()
    if kept == BLOCKS:
        assert smaller is not None
        assert logits(smaller.decoder).equal(logits(made.decoder))


def test_a_budget_of_equal_blocks_is_the_size_of_a_model_with_so_many(family: str) -> None:
    made = model(family)
    assert peers.budget(made.decoder, 2) == peers.without(made, (0, 1, 4, 5)).decoder.size().parameters


def test_tied_ffns_and_zeros_say_where_they_cannot_be_so_small() -> None:
    made = model(blocks=BLOCKS)
    assert peers.merge_and_tie(made, 1, texts()) is None
    assert peers.zeroing("magnitude", made, 0, texts()) is None


def test_quotients_are_paired_over_documents() -> None:
    def measured(nats: np.ndarray) -> Any:
        return quality.Measured(float(np.exp(nats.mean() / 10)), 0.0, 0.0, tuple(nats), 1.0)

    tokens, noise = np.full(40, 10.0), np.random.default_rng(0).normal(size=40)
    base, plan_, close, far = (measured(each) for each in (30 + noise, 31 + noise, 31 + noise[::-1], 33 + noise))
    rows = [quality.Row("base", 12, 9, 9, base)]
    rows += [quality.Row(name, 3, 5, 5, each) for name, each in (("layerfold", plan_), ("close", close), ("far", far))]
    found = {row.method: quality._figures(row, rows, tokens)["perplexity"] for row in rows}
    assert found["layerfold"]["over base"] == pytest.approx([np.exp(0.1)] * 3), "the documents differ alike"
    assert "over plan" not in found["layerfold"]
    low, high = found["close"]["over plan"][1:]
    assert low < 1 < high
    assert found["far"]["over plan"] == pytest.approx([np.exp(0.2)] * 3)
    assert not {"nats", "seconds"} & found["far"].keys()
