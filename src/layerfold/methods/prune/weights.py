"""Zeroing weights: which ones a criterion would miss least, and the masks that hold them at zero."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from layerfold.calibration import Calibration
from layerfold.errors import InputError
from layerfold.maths.moments import SecondMoments
from layerfold.maths.ranking import lowest, lowest_in_rows, shares
from layerfold.memory.mapped import beside
from layerfold.methods.prune.sparsegpt import sparsify
from layerfold.model.block import Projection
from layerfold.model.decoder import Decoder
from layerfold.model.masks import hold_
from layerfold.model.matrix import Matrix

TABLES = ("embeddings", "head")
"""What besides blocks holds a matrix: the token embedding, and the LM head."""


def matrices(decoder: Decoder, parts: Iterable[str]) -> list[Projection]:
    """Return the matrices of these parts: ``attention``, ``ffn``, and `TABLES`; one that several use once."""
    wanted = set(parts)
    for block in decoder.blocks if "ffn" in wanted else ():
        block.check_plain()
    found = [each for each in decoder.projections if each.part in wanted]
    tables = decoder.model.get_input_embeddings(), decoder.model.get_output_embeddings()
    found += [_table(decoder, part, module) for part, module in zip(TABLES, tables, strict=True) if part in wanted]
    return _distinct(found)


def linear_modules(decoder: Decoder) -> list[Projection]:
    """Return every ``nn.Linear`` of a model, the LM head included: of a GPT-2, whose projections are none, that."""
    for block in decoder.blocks:
        block.check_plain()
    return _distinct(
        _table(decoder, "linear", module) for module in decoder.model.modules() if isinstance(module, nn.Linear)
    )


def _table(decoder: Decoder, part: str, module: nn.Module) -> Projection:
    name = next(name for name, each in decoder.model.named_modules() if each is module)
    return Projection(f"{name}.weight", None, part, Matrix(module))


def _distinct(found: Iterable[Projection]) -> list[Projection]:
    first: dict[int, Projection] = {}
    for each in found:
        first.setdefault(each.matrix.key, each)
    return list(first.values())


def sizes(found: Sequence[Projection]) -> tuple[int, int]:
    """How many weights there are, and how many of them are not zero."""
    weights = [each.matrix.weight for each in found]
    return sum(each.numel() for each in weights), sum(int(torch.count_nonzero(each)) for each in weights)


def zeros_of_fours(found: Sequence[Projection]) -> int:
    """Count the zeros that 2:4 leaves: two of every four neighbours in a row, more where more are zero already.

    Raises:
        InputError: a matrix whose inputs are no multiple of four.
    """
    zeros = 0
    for each in found:
        weight = each.matrix.weight
        if weight.shape[1] % 4:
            raise InputError(
                f"structure 2:4, and {each.name!r} has {weight.shape[1]} inputs; accepted: a multiple of 4"
            )
        zeros += int((weight == 0).reshape(-1, 4).sum(1).clamp_min(2).sum())
    return zeros


@torch.no_grad()
def zero_(
    decoder: Decoder,
    found: Sequence[Projection],
    zeros: int | None,
    criterion: str,
    scope: str,
    calibration: Calibration | None,
) -> None:
    """Zero weights of some matrices, and hold them there.

    What is zero already counts, and is chosen first. Ties go to the matrix, then to the weight, that comes first.

    Args:
        found: distinct matrices of the decoder; with activations, of its blocks.
        zeros: how many weights of them are to be zero; None for two of every four neighbours in a row.
        criterion: ``magnitude``; ``wanda``, |w| times the root mean square of the input; ``sparsegpt``.
        scope: where the lowest are chosen: ``global``, in each ``matrix``, or in each ``row`` of one, as many in each
            in proportion to what is not zero there.
        calibration: text for the two criteria that read activations; of a matrix that several blocks share, of all.
    """
    counts = _counts(found, zeros)

    def here(each: Projection, *, edited: bool = False) -> AbstractContextManager[None]:
        return decoder.resident([] if each.block is None else [each.block], edited=edited)

    def edit(each: Projection, moments: SecondMoments | None) -> None:
        weight = each.matrix.weight
        if criterion == "sparsegpt":
            assert moments is not None
            new, kept = sparsify(weight, moments.products, counts.get(each.name))
            weight.copy_(new)
            weight.masked_fill_(~kept, 0)
        else:
            inputs = None if moments is None else moments.squares
            weight.masked_fill_(_chosen(scores(weight, inputs), weight, counts.get(each.name), scope), 0)

    if scope == "global" and zeros is not None:
        inputs: dict[str, Tensor] = {}
        if calibration is not None:
            tokens = int(calibration.windows.lengths.sum())
            calibration.of(decoder).each_block(
                # A matrix that several blocks share is missed in each of them.
                lambda _, moments: inputs.update({name: m.squares * (m.count / tokens) for name, m in moments.items()}),
                whole=False,
                edits=False,
                doing="calibrating, block",
                pooled=True,
            )

        def rated() -> Iterator[Tensor]:
            for each in found:
                with here(each):
                    yield scores(each.matrix.weight, inputs.get(each.name))

        for each, lost in zip(found, lowest(rated, zeros), strict=True):
            with here(each, edited=True):
                each.matrix.weight.masked_fill_(lost, 0)
    elif calibration is None:
        for each in found:
            with here(each, edited=True):
                edit(each, None)
    else:

        def visit(index: int, moments: dict[str, SecondMoments]) -> None:
            for each in found:
                if each.block == index:
                    edit(each, moments[each.name])

        calibration.of(decoder).each_block(
            visit,
            whole=criterion == "sparsegpt",
            edits=True,
            doing="pruning, block",
            pooled=True,
        )
    own = {each.name: each.matrix.module.weight for each in found}
    hold_(decoder, {name: beside(weight, weight != 0) for name, weight in own.items()})


def scores(weight: Tensor, inputs: Tensor | None) -> Tensor:
    """How much each weight would be missed, (out, in): a zero scores 0; every other weight scores more.

    Args:
        inputs: (in,) mean squares of the inputs, for Wanda's score; None for the magnitude.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (Wanda), 2023, equation 1.
    """
    found = weight.abs().float()
    if inputs is not None:
        found *= inputs.sqrt()
    return found.clamp_(min=torch.finfo(found.dtype).tiny).masked_fill_(weight == 0, 0)


def _chosen(found: Tensor, weight: Tensor, zeros: int | None, scope: str) -> Tensor:
    """Mark what of one matrix goes."""
    if zeros is None:
        return lowest_in_rows(found.reshape(-1, 4), torch.tensor(2)).view_as(found)
    if scope == "row":
        left = torch.count_nonzero(weight, dim=1)
        done = weight.shape[1] - left
        return lowest_in_rows(found, done + shares(max(0, zeros - int(done.sum())), left))
    return next(lowest(lambda: [found], zeros))


def _counts(found: Sequence[Projection], zeros: int | None) -> dict[str, int]:
    """How many of each matrix's weights are to be zero, those that are already among them."""
    if zeros is None:
        return {}
    left = torch.tensor([int(torch.count_nonzero(each.matrix.weight)) for each in found])
    done = torch.tensor([each.matrix.weight.numel() for each in found]) - left
    each_one = done + shares(max(0, zeros - int(done.sum())), left)
    return {each.name: int(count) for each, count in zip(found, each_one, strict=True)}
