"""What a plan tries: what takes blocks or FFNs away, and how many neurons and heads go besides to reach a size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from layerfold.errors import InputError
from layerfold.methods import METHODS, Drop, Method, Prune, Steps
from layerfold.methods.prune import units
from layerfold.model.decoder import Decoder
from layerfold.repair.repair import Level

WHOLE: Level = "refit+attention"


@dataclass(frozen=True)
class Candidate:
    """A way to make the model smaller.

    Attributes:
        family: what kind of way that is, as a plot groups it.
        methods: what is done, in order.
        repair: and what follows.
    """

    family: str
    methods: tuple[Method, ...]
    repair: Level

    @property
    def method(self) -> Method:
        """What is done, as one."""
        return self.methods[0] if len(self.methods) == 1 else Steps(self.methods)

    @property
    def said(self) -> str:
        """What is done, for people."""
        done = [method.said for method in self.methods] or ["as it is"]
        return " + ".join(done) + (", repaired" if self.repair != "none" else "")

    def row(self, label: str) -> dict[str, Any]:
        """Return it as a recipe's row."""
        steps = [each.to_json() for each in self.methods]
        made = steps[0] if len(steps) == 1 else {Steps.name: steps}
        return {"label": label, **made, **({} if self.repair == "none" else {"repair": self.repair})}


def narrowed(decoder: Decoder, methods: Sequence[Method], size: int) -> tuple[Method, ...] | None:
    """Return methods with as much removed after them, of neurons and heads, as it takes to have so many parameters.

    Nothing is removed where the methods by themselves come to no more. What goes is what the loss misses least for its
    size (criterion taylor).

    Returns:
        None where an FFN would be left without neurons.
    """
    left = sizes(decoder, methods)
    if left.parameters <= size:
        return tuple(methods)
    removed = left.parameters - size
    if removed > left.removable:
        return None
    return (*methods, Prune(sparsity=removed / left.units, structure="neurons+heads", criterion="taylor"))


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters.

    Attributes:
        parameters: of the whole model.
        units: that go with neurons and heads.
        removable: of those, how many can go.
    """

    parameters: int
    units: int
    removable: int


def sizes(decoder: Decoder, methods: Sequence[Method]) -> Sizes:
    """Count what methods leave."""
    left = outline(decoder, methods)
    found = units.sublayers(left)
    return Sizes(count(left), sum(int(each.sizes.sum()) for each in found), units.removable(found))


def rivals(decoder: Decoder, size: int, order: Iterable[tuple[int, ...]]) -> Iterator[Candidate]:
    """Yield what each method by itself comes to at a size, as it is and repaired; nothing of one that cannot be.

    Args:
        order: sets of blocks to drop, none and then one more each; no more of them are asked for than it takes.
    """
    dropped: Iterable[Method] = (Drop(blocks=blocks) for blocks in order if blocks)
    for methods in (dropped, *(each.ladder(decoder.n_blocks) for each in METHODS.values())):
        for method in methods:  # the least first
            try:
                small = count(outline(decoder, [method])) <= size
            except InputError:  # what the model does not admit, as groups of FFNs that are not of one width
                continue
            if small:
                for level in ("none", WHOLE):
                    yield Candidate(method.name, (method,), level)
                break
    pruned = narrowed(decoder, (), size)
    if pruned:
        for level in ("none", WHOLE):
            yield Candidate("prune", pruned, level)


def outline(decoder: Decoder, methods: Sequence[Method]) -> Decoder:
    """Return a decoder with the structure, but not the weights, that methods leave."""
    left = decoder.copy(share=not any(method.writes for method in methods))
    for method in methods:
        method.outline().apply(left, None)
    return left


def count(decoder: Decoder) -> int:
    """Count distinct parameters."""
    return sum(tensor.numel() for tensor in decoder.model.parameters())
