"""One FFN base for a window of blocks and a low-rank delta for each: which base, which deltas, which ranks.

W_l = W_c + A_l B_l for each of the FFN's matrices, its neurons in the order of the window's anchor. Biases stay each
block's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from layerfold.calibration import FFNInputs
from layerfold.maths.linalg import Directions, Match, damped, output_directions
from layerfold.maths.moments import SecondMoments
from layerfold.memory.mapped import beside
from layerfold.model.decoder import Decoder
from layerfold.model.factored import Factored
from layerfold.model.matrix import Matrix

Base = Literal["anchor", "mean", "fitted"]
Init = Literal["data-svd", "svd", "zero"]
Ranks = Literal["uniform", "allotted"]
BASES: tuple[Base, ...] = get_args(Base)
INITS: tuple[Init, ...] = get_args(Init)
RANKS: tuple[Ranks, ...] = get_args(Ranks)

_ROUNDS = 5
"""In which a fitted base and its deltas are fitted to each other."""

_SEED = 0
"""Of the B of deltas that begin as zero."""


@dataclass
class Member:
    """One block's matrix of a kind, its neurons in the anchor's order.

    Attributes:
        path: of the module in the model.
        matrix: the module as it is.
        weight: (out, in), a copy.
        bias: (out,), a copy, or None.
        mean: of what it reads, (in,), and `root`, the factor L of its second moments H = L L^T; of the moments about
            the mean where a bias can make up for the mean. None without activations.
        weighted: the weight times H.
    """

    path: str
    matrix: Matrix
    weight: Tensor
    bias: Tensor | None
    mean: Tensor | None = None
    root: Tensor | None = None
    weighted: Tensor | None = None


@dataclass
class Kind:
    """The up, gate or down matrices of a window's FFNs, and what they come to share.

    Attributes:
        members: by block, in order.
        base: W_c, (out, in).
        factor: the lower Cholesky factor of the sum of the members' H; None without activations.
    """

    members: Sequence[Member]
    base: Tensor
    factor: Tensor | None = None

    def directions(self, most: int | None) -> list[Directions]:
        """For each block, where among its outputs the base falls short of its own matrix; so many at most."""
        return [output_directions(each.weight - self.base, each.root, most) for each in self.members]

    def refit_(self, found: Sequence[Directions], ranks: Sequence[int]) -> None:
        """Set the base to the best for the deltas that the present one leaves, of these ranks.

        That is the W of the least sum of E|(W_l - A_l B_l - W) x_l|^2 over the blocks.
        """
        total = torch.zeros_like(self.base)
        for member, directions, rank in zip(self.members, found, ranks, strict=True):
            a, b = directions.factors(member.weight - self.base, rank)
            if member.root is None:
                total += torch.addmm(member.weight, a, b, alpha=-1)
            else:
                total += torch.addmm(cast(Tensor, member.weighted), a, b @ member.root @ member.root.T, alpha=-1)
        self.base = total / len(self.members) if self.factor is None else torch.cholesky_solve(total.T, self.factor).T


@dataclass(frozen=True)
class Truncation:
    """For each kind and block the directions of what the base leaves, and the rank of its delta."""

    directions: Sequence[Sequence[Directions]]
    ranks: Sequence[Sequence[int]]


def kinds(decoder: Decoder, window: range, matches: Mapping[int, Match], inputs: Mapping[int, FFNInputs]) -> list[Kind]:
    """Return the matrices of a window's FFNs by kind: up, gate where there is one, down.

    Args:
        matches: of the neurons, by block, with the anchor's; blocks without one keep theirs as they stand.
        inputs: what the matrices read, by block; none where that is not to count.
    """
    paths = {id(module): path for path, module in decoder.model.named_modules()}
    members: list[list[Member]] = []
    totals: list[Tensor | None] = [None] * len(decoder.blocks[window[0]].ffn.matrices)
    for index in window:
        ffn = decoder.blocks[index].ffn
        match = matches.get(index)
        tensors = iter(ffn.tensors(torch.arange(ffn.d_ffn)) if match is None else ffn.tensors(match.order, match.signs))
        found = []
        for place, matrix in enumerate(ffn.matrices):
            weight = next(tensors).float()
            bias = None if matrix.bias is None else next(tensors).clone()
            member = Member(paths[id(matrix.module)], matrix, weight, bias)
            if index in inputs:
                down = matrix is ffn.down
                moments = inputs[index].down if down else inputs[index].up
                products, total = _read(member, moments, match if down else None), totals[place]
                totals[place] = products if total is None else total.add_(products)
            found.append(member)
        members.append(found)
    return [
        Kind(
            members=each,
            base=torch.stack([member.weight for member in each]).mean(0),
            factor=None if total is None else torch.linalg.cholesky(total),
        )
        for each, total in zip(zip(*members, strict=True), totals, strict=True)
    ]


def _read(member: Member, moments: SecondMoments, match: Match | None) -> Tensor:
    """Tell a member what it reads; return H."""
    mean, products = moments.mean, moments.products
    if match is not None:
        mean, products = mean[match.order], products[match.order][:, match.order]
        if match.signs is not None:
            mean *= match.signs
            products *= match.signs
            products *= match.signs[:, None]
    if member.bias is not None:
        products = products.addr_(mean, mean, alpha=-1)
    # Of fewer rows than variables H says nothing in some directions: as much is added there as it says elsewhere.
    products, root = damped(products) if moments.count >= len(products) else damped(products, 1.0)
    member.mean, member.root, member.weighted = mean, root, member.weight @ products
    return products


def fitted(
    kinds: Sequence[Kind], base: Base, ranks: Ranks, rank: int, anchor: int, *, alone: bool = False
) -> Truncation:
    """Choose the bases of a window's matrices, and the deltas' ranks.

    Args:
        anchor: place of the anchor among the blocks.
        alone: whether a ``fitted`` base is to leave nothing to deltas.
    """
    for kind in kinds if base == "anchor" else ():
        kind.base = kind.members[anchor].weight
    for _ in range(_ROUNDS if base == "fitted" else 0):
        # In turn the best deltas for the bases and the best bases for the deltas: with uniform ranks the error never
        # rises.
        truncation = _fit(kinds, ranks, 0 if alone else rank)
        for kind, directions, chosen in zip(kinds, truncation.directions, truncation.ranks, strict=True):
            kind.refit_(directions, chosen)
    return _fit(kinds, ranks, rank)


def _fit(kinds: Sequence[Kind], ranks: Ranks, rank: int) -> Truncation:
    found = [kind.directions(rank if ranks == "uniform" else None) for kind in kinds]
    uniform = [[rank] * len(kind.members) for kind in kinds]
    return Truncation(found, allotted(kinds, found, rank) if ranks == "allotted" else uniform)


def allotted(kinds: Sequence[Kind], found: Sequence[Sequence[Directions]], rank: int) -> list[list[int]]:
    """Return ranks for all deltas that hold no more parameters together than all of one rank would.

    One by one the direction is taken that makes up for most, as a share of what its matrix puts out, for each
    parameter that it takes.
    """
    budget = sum(rank * sum(each.base.shape) * len(each.members) for each in kinds)
    candidates = []
    for place, (kind, directions) in enumerate(zip(kinds, found, strict=True)):
        for block, (member, each) in enumerate(zip(kind.members, directions, strict=True)):
            output = member.weight if member.root is None else member.weight @ member.root
            worth = each.energies / output.square().sum() / sum(kind.base.shape)
            candidates += [(-value, place, block) for value in worth.tolist() if value > 0]
    ranks = [[0] * len(kind.members) for kind in kinds]
    for _, place, block in sorted(candidates):
        if (cost := sum(kinds[place].base.shape)) > budget:
            break
        ranks[place][block] += 1
        budget -= cost
    return ranks


def share_(decoder: Decoder, kinds: Sequence[Kind], truncation: Truncation, init: Init) -> None:
    """Put the bases and deltas in the place of the matrices, which are left as they are."""
    seeds = count(_SEED)
    for kind, found, ranks in zip(kinds, truncation.directions, truncation.ranks, strict=True):
        like = kind.members[0].matrix.weight
        shared = torch.nn.Parameter(beside(like, kind.base.to(like.dtype)))
        for member, directions, rank in zip(kind.members, found, ranks, strict=True):
            residual = member.weight - kind.base
            if init == "zero":
                b = _random(rank, residual.shape[1], next(seeds)).to(residual.device)
                a = residual.new_zeros(len(residual), rank)
            else:
                a, b = directions.factors(residual, rank)
            bias = member.bias
            if bias is not None and member.mean is not None:
                bias = (bias + residual @ member.mean - a @ (b @ member.mean)).to(bias.dtype)
            stock = type(member.matrix.module)
            decoder.model.set_submodule(
                member.path, Factored(shared, a.to(shared.dtype), b.to(shared.dtype), bias, stock)
            )


def _random(rows: int, columns: int, seed: int) -> Tensor:
    drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return drawn / math.sqrt(columns)
