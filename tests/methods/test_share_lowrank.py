"""Bases, deltas and ranks, against numpy's float64."""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny import base, reads, windows

from layerfold.calibration import Calibration, FFNInputs
from layerfold.maths.linalg import Match
from layerfold.methods import Share
from layerfold.methods.share import lowrank
from layerfold.methods.share.lowrank import Kind, Truncation
from layerfold.model.deltas import factored

Array = NDArray[np.float64]
WINDOW = range(1, 4)
ANCHOR = 2
CUT = windows()
READS = pytest.mark.parametrize("reads", [True, False], ids=["data", "plain"])


@functools.cache
def known(family: str) -> tuple[dict[int, Match], dict[int, FFNInputs]]:
    """How a window's neurons were matched, and what its FFNs read."""
    calibration = Calibration(base(family), CUT)
    matches = calibration.matches((ANCHOR, index) for index in WINDOW if index != ANCHOR)
    return {other: match for (_, other), match in matches.items()}, calibration.ffn_inputs(WINDOW)


def kinds(family: str, reads: bool = True, align: bool = True) -> list[Kind]:
    matches, inputs = known(family)
    return lowrank.kinds(base(family), WINDOW, matches if align else {}, inputs if reads else {})


def double(tensor: torch.Tensor) -> Array:
    return tensor.double().numpy()


def left(found: list[Kind], fit: Truncation) -> list[float]:
    """By matrix what the deltas leave of its output, as a share of that."""
    return [error / whole for error, whole in errors(found, fit)]


def errors(found: list[Kind], fit: Truncation) -> list[tuple[float, float]]:
    """By matrix the squares of what the deltas leave of its output, and of that."""
    pairs = []
    for kind, directions, ranks in zip(found, fit.directions, fit.ranks, strict=True):
        for member, each, rank in zip(kind.members, directions, ranks, strict=True):
            a, b = each.factors(member.weight - kind.base, rank)
            weight, delta = double(member.weight), double(a) @ double(b)
            root = np.eye(weight.shape[1]) if member.root is None else double(member.root)
            missed = np.square((weight - double(kind.base) - delta) @ root).sum()
            pairs.append((float(missed), float(np.square(weight @ root).sum())))
    return pairs


# What a matrix reads


@functools.cache
def reads_of(family: str) -> dict[str, Array]:
    """By matrix what it reads, (tokens, in), of the model as it was, in the order of the neurons that it had."""
    return {name.removesuffix(".weight"): x for name, x in reads(base(family), CUT).items()}


def is_down(path: str) -> bool:
    return path.endswith(("down_proj", "c_proj"))


def matched(family: str, path: str, align: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """The order of the neurons of a matrix, and by what each is multiplied: of `up` and `down`, not of `gate`."""
    index = int(path.split(".")[2])
    match = known(family)[0].get(index) if align else None
    if match is None:
        return torch.arange(base(family).d_ffn[index]), torch.ones(base(family).d_ffn[index])
    signs = torch.ones(len(match.order)) if match.signs is None or "gate" in path else match.signs
    return match.order, signs


@pytest.mark.parametrize("align", [True, False])
def test_members_are_the_matrices_with_their_neurons_in_the_anchors_order(family: str, align: bool) -> None:
    for kind in kinds(family, align=align):
        for member in kind.members:
            order, signs = matched(family, member.path, align)
            down = is_down(member.path)
            original = member.matrix.weight
            expected = original[:, order] * signs if down else original[order] * signs[:, None]
            assert torch.equal(member.weight, expected)
            if member.bias is not None and member.matrix.bias is not None:
                assert torch.equal(member.bias, member.matrix.bias if down else member.matrix.bias[order] * signs)
                assert member.bias.data_ptr() != member.matrix.bias.data_ptr()
            assert member.weight.data_ptr() != original.data_ptr()
        assert torch.equal(kind.base, torch.stack([member.weight for member in kind.members]).mean(0))


def test_roots_are_of_the_damped_moments_about_the_mean_where_there_is_a_bias(family: str) -> None:
    for kind in kinds(family):
        for member in kind.members:
            x = reads_of(family)[member.path]
            if is_down(member.path):
                order, signs = matched(family, member.path)
                x = x[:, order.numpy()] * signs.numpy()
            assert member.root is not None
            assert member.mean is not None
            about = x if member.bias is None else x - x.mean(0)
            h = about.T @ about / len(x)
            h += 0.01 * np.diag(h).mean() * np.eye(len(h))
            scale = np.sqrt(np.outer(np.diag(h), np.diag(h)))
            assert (np.abs(double(member.root) @ double(member.root).T - h) / scale).max() < 1e-3
            assert np.abs(double(member.mean) - x.mean(0)).max() < 1e-4 * np.abs(x).max()


# Deltas


@READS
@pytest.mark.parametrize("rank", [1, 8, 32])
def test_deltas_are_the_best_of_their_rank(rank: int, reads: bool, family: str) -> None:
    found = kinds(family, reads)
    fit = lowrank.fitted(found, "mean", "uniform", rank, 1)
    expected = []
    for kind in found:
        for member in kind.members:
            root = np.eye(kind.base.shape[1]) if member.root is None else double(member.root)
            singular = np.linalg.svd((double(member.weight) - double(kind.base)) @ root, compute_uv=False)
            expected.append(float(np.square(singular[rank:]).sum() / np.square(double(member.weight) @ root).sum()))
    assert left(found, fit) == pytest.approx(expected, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize(
    "settings",
    [{"init": "data-svd", "rank": 4}, {"init": "data-svd", "rank": 0}, {"init": "zero", "base": "fitted", "rank": 4}],
    ids=str,
)
@pytest.mark.parametrize("align", ["hungarian", "none"])
def test_biases_make_up_for_the_mean_of_what_is_missed(settings: dict[str, Any], align: Any) -> None:
    for family in ("gpt2", "llama"):
        decoder = base(family).copy()
        Share(window="1:3", align=align, anchor="middle", **settings).apply(decoder, Calibration(base(family), CUT))
        for path, module in factored(decoder).items():
            original = base(family).model.get_submodule(path)
            x = torch.tensor(reads_of(family)[path], dtype=torch.float32)
            order, signs = matched(family, path, align == "hungarian")
            down = is_down(path)
            with torch.no_grad():
                expected = original(x).mean(0) if down else original(x).mean(0)[order] * signs
                found = module(x[:, order] * signs if down else x).mean(0)
            assert (found - expected).abs().max() < 1e-4 * (1 + expected.abs().max())


# Bases


@READS
@pytest.mark.parametrize("ranks", ["uniform", "allotted"])
@pytest.mark.parametrize("rank", [0, 3])
def test_a_fitted_base_never_does_worse_the_longer_it_is_fitted(
    rank: int, ranks: Any, reads: bool, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    totals = []
    for rounds in (0, 1, 2, 5):
        monkeypatch.setattr(lowrank, "_ROUNDS", rounds)
        found = kinds(family, reads)
        fit = lowrank.fitted(found, "fitted", ranks, rank, 1)
        totals.append(sum(error for error, _ in errors(found, fit)))
    found = kinds(family, reads)
    assert totals[0] == pytest.approx(sum(e for e, _ in errors(found, lowrank.fitted(found, "mean", ranks, rank, 1))))
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in pairwise(totals))
    assert totals[-1] < totals[0] * 0.9999 or not (reads or rank)


def test_a_fitted_base_without_deltas_is_the_mean_weighted_by_what_is_read(family: str) -> None:
    found = kinds(family)
    lowrank.fitted(found, "fitted", "uniform", 0, 1)
    for kind in found:
        moments = [double(each.root) @ double(each.root).T for each in kind.members if each.root is not None]
        products = sum(double(each.weight) @ h for each, h in zip(kind.members, moments, strict=True))
        expected = np.linalg.solve(sum(moments), products.T).T
        assert double(kind.base) == pytest.approx(expected, abs=1e-3)


def test_the_anchors_base_is_its_matrix_and_its_own_delta_is_zero(family: str) -> None:
    found = kinds(family)
    fit = lowrank.fitted(found, "anchor", "uniform", 4, 1)
    for kind, directions in zip(found, fit.directions, strict=True):
        assert torch.equal(kind.base, kind.members[1].matrix.weight)
        a, b = directions[1].factors(kind.members[1].weight - kind.base, 4)
        assert not (a @ b).any()


# Ranks


@READS
@pytest.mark.parametrize("rank", [0, 1, 5, 20])
@pytest.mark.parametrize("chosen", ["mean", "anchor"])
def test_allotted_ranks_use_up_the_budget_and_miss_no_more_than_uniform_ones(
    chosen: Any, rank: int, reads: bool, family: str
) -> None:
    found = kinds(family, reads)
    uniform = lowrank.fitted(found, chosen, "uniform", rank, 1)
    allotted = lowrank.fitted(found, chosen, "allotted", rank, 1)
    one = sum(found[0].base.shape)
    assert {sum(kind.base.shape) for kind in found} == {one}
    budget, used = (one * sum(map(sum, fit.ranks)) for fit in (uniform, allotted))
    assert budget == one * rank * len(found) * len(WINDOW)
    assert all(0 <= each <= 32 for ranks in allotted.ranks for each in ranks)
    admitted = 2 if chosen == "anchor" else 3  # of three blocks the anchor itself leaves nothing to make up for
    exhausted = sum(map(sum, allotted.ranks)) == 32 * admitted * len(found)
    assert used <= budget
    assert used > budget - one or exhausted
    assert sum(left(found, allotted)) <= sum(left(found, uniform)) * (1 + 1e-5) + 1e-9
    if chosen == "anchor":
        assert [ranks[1] for ranks in allotted.ranks] == [0] * len(found)
    if rank == 5:
        assert len({each for ranks in allotted.ranks for each in ranks}) > 1


def test_matrices_that_put_out_nothing_are_allotted_nothing() -> None:
    found = kinds("llama", reads=False)
    for member in found[0].members:
        member.weight.zero_()
    found[0].base.zero_()
    fit = lowrank.fitted(found, "mean", "allotted", 2, 1)
    assert list(fit.ranks[0]) == [0, 0, 0]
    assert sum(map(sum, fit.ranks)) == 2 * 9
