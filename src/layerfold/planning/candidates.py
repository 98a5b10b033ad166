"""Configurations that a plan tries: methods that remove blocks or FFNs, and then neurons and heads to reach a size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from layerfold.checkpoint.weighing import dense_parameters
from layerfold.checkpoint.weighing import parameters as count
from layerfold.errors import InputError
from layerfold.methods import METHODS, Drop, Method, Prune, Steps
from layerfold.methods.prune import units
from layerfold.model.decoder import Decoder
from layerfold.repair.repair import Level

WHOLE: Level = "refit+attention"
_LEVELS: tuple[Level, Level] = ("none", WHOLE)


@dataclass(frozen=True)
class Configuration:
    """Methods in order, and the repair that follows.

    Attributes:
        family: its kind, by which plots group.
    """

    family: str
    methods: tuple[Method, ...]
    repair: Level

    @property
    def method(self) -> Method:
        """The methods as one."""
        return self.methods[0] if len(self.methods) == 1 else Steps(self.methods)

    @property
    def said(self) -> str:
        """What is done, for people."""
        done = [method.said for method in self.methods] or ["as it is"]
        return " + ".join(done) + (", repaired" if self.repair != "none" else "")

    @property
    def row(self) -> dict[str, Any]:
        """A recipe's row, without its label."""
        steps = [each.to_json() for each in self.methods]
        made = steps[0] if len(steps) == 1 else {Steps.name: steps}
        return {**made, **({} if self.repair == "none" else {"repair": self.repair})}


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters.

    Attributes:
        parameters: of the whole model.
        units: of neurons and heads.
        removable: of the neurons and heads that can go.
    """

    parameters: int
    units: int
    removable: int


def sizes(decoder: Decoder, methods: Sequence[Method]) -> Sizes:
    """Count what methods leave."""
    left = outline(decoder, methods)
    found = units.sublayers(left)
    return Sizes(count(left), sum(int(each.sizes.sum()) for each in found), units.removable(found))


def narrowed(
    decoder: Decoder, methods: Sequence[Method], size: int, multiple_of: int | None = None
) -> tuple[Method, ...] | None:
    """Return methods, followed by the removal of enough neurons and heads to reach a number of parameters.

    Nothing is removed where the methods by themselves reach it. Those go whose removal raises the loss least for their
    size (criterion taylor).

    Args:
        multiple_of: remove as many from each block, and leave each FFN a multiple of this; None lets blocks differ.

    Returns:
        None where an FFN would be left without neurons.
    """
    left = sizes(decoder, methods)
    removed = left.parameters - size
    if removed <= 0:
        return tuple(methods)
    if removed > left.removable:
        return None
    sparsity = removed / left.units
    prune = Prune(sparsity=sparsity, structure="neurons+heads", criterion="taylor")
    if multiple_of is None:
        return (*methods, prune)
    if not _alike(decoder, methods, round(sparsity * left.units), multiple_of):
        return None
    return (*methods, replace(prune, uniform=True, multiple_of=multiple_of))


def _alike(decoder: Decoder, methods: Sequence[Method], amount: int, multiple_of: int) -> bool:
    """Whether an amount can go alike from the blocks that methods leave."""
    try:
        return next(units.alike(outline(decoder, methods), amount, multiple_of), None) is not None
    except InputError:  # they differ
        return False


def rivals(
    decoder: Decoder, size: int, order: Iterable[tuple[int, ...]], multiple_of: int | None = None
) -> Iterator[Configuration]:
    """Yield each method by itself at the mildest setting that reaches a size, with and without repair.

    A method that the model does not admit, or that does not reach the size, is left out.

    Args:
        order: sets of blocks to drop, none and then one more each; read no further than needed.
        multiple_of: see `narrowed`; where it is given, the dense form has to be as small.
    """
    counted = count if multiple_of is None else dense_parameters
    dropped: Iterable[Method] = (Drop(blocks=blocks) for blocks in order if blocks)
    ladders = (dropped, *(each.ladder(decoder.n_blocks) for each in METHODS.values()))

    def small(method: Method) -> bool:
        try:
            return counted(outline(decoder, [method])) <= size
        except InputError:  # what the model does not admit, as groups of FFNs that are not of one width
            return False

    mildest = [next(filter(small, ladder), None) for ladder in ladders]
    alone: list[tuple[str, tuple[Method, ...]]] = [(method.name, (method,)) for method in mildest if method]
    pruned = narrowed(decoder, (), size, multiple_of)
    for family, methods in (*alone, *([("prune", pruned)] if pruned else [])):
        for level in _LEVELS:
            yield Configuration(family, methods, level)


def outline(decoder: Decoder, methods: Sequence[Method]) -> Decoder:
    """Return a decoder with the structure, but not the weights, that methods leave."""
    left = decoder.copy(share=not any(method.writes for method in methods))
    for method in methods:
        method.outline().apply(left, None)
    return left
