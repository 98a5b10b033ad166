"""Removing whole neurons from FFNs: smaller matrices, which every kernel profits from."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from layerfold.calibration import Calibration
from layerfold.errors import InputError
from layerfold.maths.moments import SecondMoments
from layerfold.maths.ranking import lowest, lowest_in_rows, shares
from layerfold.methods.prune.sparsegpt import refitted, removal_errors
from layerfold.model.decoder import Decoder
from layerfold.model.ffn import FFN


def sizes(decoder: Decoder) -> tuple[Tensor, int]:
    """Count how many of each neuron's weights are not zero, (neurons,), and how many can go: each FFN keeps one."""
    counts = [torch.zeros(0, dtype=torch.int64)]
    for index, *_ in decoder.blocks_by_ffn:
        held = [each.count_nonzero(1) for each in decoder.blocks[index].ffn.units]
        counts.append(torch.stack(held).sum(0).cpu())
    return torch.cat(counts), sum(map(len, counts)) - len(counts) + 1


def check_refit(decoder: Decoder) -> None:
    """Raise InputError for an FFN that a refit would fill where zeros are to stay."""
    for index, *_ in decoder.blocks_by_ffn:
        if decoder.blocks[index].ffn.down.holds_zeros:
            raise InputError(
                f"criterion 'sparsegpt' refits the FFN of block {index}, which holds zeros that are to stay; accepted: "
                "magnitude, wanda, or neurons first and zeros then"
            )


@torch.no_grad()
def narrow_(decoder: Decoder, removed: int, criterion: str, scope: str, calibration: Calibration | None) -> None:
    """Remove neurons from all FFNs.

    Args:
        removed: how many in all.
        criterion: ``magnitude``, the norm of all of a neuron's weights; ``wanda``, the root mean square of its
            activation times the norm of what it is multiplied by in `down`; ``sparsegpt``, the error of its removal
            when the others and the bias make up for it, which they then do, by least squares; ``taylor``, what the loss
            would miss: see `sensitivities`.
        scope: where the lowest are chosen: ``global``, or in each ``matrix``, as many in proportion to its neurons.
        calibration: text for the criteria that need it; of an FFN that several blocks share, in all of them.
    """
    blocks = {tied[0]: tied for tied in decoder.blocks_by_ffn}
    ffns = {index: decoder.blocks[index].ffn for index in blocks}
    downs = {each.matrix.module: each.name for each in decoder.projections}
    counts = shares(removed, torch.tensor([ffn.d_ffn - 1 for ffn in ffns.values()]))
    count_of = dict(zip(ffns, counts, strict=True))

    def remove(index: int, lost: Tensor, moments: SecondMoments | None = None) -> None:
        kept = (~lost).nonzero()[:, 0]
        if criterion == "sparsegpt" and lost.any():
            assert moments is not None
            refit_(ffns[index], moments, kept)
        decoder.keep_neurons_(dict.fromkeys(blocks[index], kept))

    def read(visit: Callable[[int, SecondMoments], None], *, whole: bool, edits: bool, doing: str) -> None:
        assert calibration is not None
        calibration.of(decoder).each_block(
            lambda index, moments: visit(index, moments[downs[ffns[index].down.module]]) if index in ffns else None,
            whole=whole,
            edits=edits,
            doing=doing,
            pooled=True,
        )

    known: dict[int, Tensor] = {}
    if calibration is None:
        known = {index: scores(ffn, criterion, None) for index, ffn in ffns.items()}
    elif criterion == "taylor":
        felt = calibration.sensitivities(decoder).neurons
        known = {index: torch.stack([felt[each] for each in blocks[index]]).sum(0).float() for index in ffns}
    elif scope == "global":
        tokens = int(calibration.windows.lengths.sum())

        def rate(index: int, moments: SecondMoments) -> None:
            # An FFN that several blocks share is missed in each of them.
            known[index] = scores(ffns[index], criterion, moments) * math.sqrt(moments.count / tokens)

        read(rate, whole=False, edits=False, doing="calibrating, block")
    if scope == "global":
        for each in known.values():
            each[each.argmax()] = torch.inf  # so that none is left without any
        for index, lost in zip(known, list(lowest(known.values, removed)), strict=True):
            remove(index, lost)
    elif calibration is None or criterion == "taylor":
        for index, rated in known.items():
            remove(index, lowest_in_rows(rated[None], count_of[index])[0])
    else:

        def edit(index: int, moments: SecondMoments) -> None:
            rated = scores(ffns[index], criterion, moments)
            remove(index, lowest_in_rows(rated[None], count_of[index])[0], moments)

        read(edit, whole=criterion == "sparsegpt", edits=True, doing="pruning, block")


def scores(ffn: FFN, criterion: str, moments: SecondMoments | None) -> Tensor:
    """How much each neuron would be missed, (d_ffn,) float32."""
    down = ffn.down.weight.float()
    if moments is None:
        first = [matrix.weight.float().square().sum(1) for matrix in ffn.matrices if matrix is not ffn.down]
        inner = [rows for each in first for rows in ffn.by_neuron(each)]
        return torch.stack([*inner, down.square().sum(0)]).sum(0).sqrt()
    if criterion == "wanda":
        return down.square().sum(0).mul_(moments.squares).sqrt_()
    return removal_errors(*_with_bias(ffn, moments))[: ffn.d_ffn]


def refit_(ffn: FFN, moments: SecondMoments, kept: Tensor) -> None:
    """Overwrite what the neurons that are kept are multiplied by in `down`, and its bias if it has one."""
    weight, products = _with_bias(ffn, moments)
    always = torch.arange(ffn.d_ffn, len(products), device=kept.device)
    found = refitted(weight, products, torch.cat([kept, always])).to(ffn.down.weight.dtype)
    ffn.down.weight[:, kept] = found[:, : len(kept)]
    if ffn.down.bias is not None:
        ffn.down.bias.copy_(found[:, -1])


def _with_bias(ffn: FFN, moments: SecondMoments) -> tuple[Tensor, Tensor]:
    """`down` and the moments of what it reads: its bias is the weight of one more input, which is always 1."""
    weight, bias, products = ffn.down.weight.float(), ffn.down.bias, moments.products
    if bias is None:
        return weight, products
    mean = torch.cat([moments.mean, moments.mean.new_ones(1)])
    products = torch.cat([torch.cat([products, mean[None, :-1]]), mean[:, None]], dim=1)
    return torch.cat([weight, bias[:, None]], dim=1), products
