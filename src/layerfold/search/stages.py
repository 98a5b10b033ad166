"""What candidates consist of: blocks of the model as it is, and blocks that are otherwise, each a stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Protocol

from torch import Tensor

from layerfold.inference.spool import Apart
from layerfold.inference.stepping import Stepper
from layerfold.methods.drop import Part
from layerfold.model.decoder import Decoder

Blocks = tuple[int, ...]
"""Indices of the blocks that a candidate has otherwise, in order; none for the model as it is."""


class Stages(Protocol):
    """Decoders whose blocks are numbered through, as if all were of one depth: the model as it is comes first."""

    @property
    def steppers(self) -> Sequence[Stepper]:
        """One for each decoder."""
        ...

    def path(self, candidate: Blocks) -> Path:
        """Return the stages that a candidate passes."""
        ...


class Lacking:
    """Candidates that lack blocks, or only their attention or FFN.

    Args:
        decoder: the model as it is; never edited.
    """

    def __init__(self, decoder: Decoder, part: Part = "block") -> None:
        self._part, self._n_blocks = part, decoder.n_blocks
        self.steppers = [Stepper(decoder)]
        if part != "block":
            lacking = decoder.copy(share=True)
            lacking.remove_(part, removable(decoder, part))
            self.steppers.append(Stepper(lacking))

    def path(self, candidate: Blocks) -> Path:
        """Return the blocks that are left, or, in the place of one that lacks a part, that one."""
        n = self._n_blocks
        if self._part == "block":
            return tuple(i for i in range(n) if i not in candidate)
        return tuple(n + i if i in candidate else i for i in range(n))


class Replaced:
    """Candidates that have the blocks of another decoder in the place of their own.

    One of the other decoders at a time has its own tensors in memory. In a walk the candidates come one after the
    other, so that each is read once for each batch of text.

    Args:
        decoder: the model as it is; never edited.
        others: by candidate, a decoder of the same depth beside this one.
    """

    def __init__(self, decoder: Decoder, others: Mapping[Blocks, Apart]) -> None:
        self._n_blocks = decoder.n_blocks
        self._first = {candidate: place * decoder.n_blocks for place, candidate in enumerate(others, 1)}
        room = Room()
        self.steppers = [Stepper(decoder), *(Fetched(each, room) for each in others.values())]

    def path(self, candidate: Blocks) -> Path:
        """Return the model's own blocks, and in their places the other decoder's."""
        return tuple(self._first[candidate] + i if i in candidate else i for i in range(self._n_blocks))


class Room:
    """Memory for the own tensors of one decoder at a time."""

    def __init__(self) -> None:
        self._holder: Apart | None = None

    def fetch(self, wanted: Apart) -> None:
        """Bring a decoder's tensors into memory, and write those that are there to their file."""
        if self._holder is not None and self._holder is not wanted:
            self._holder.own.stow()
        self._holder = wanted
        wanted.own.fetch()


class Fetched(Stepper):
    """Steps through a decoder whose own tensors wait in a temporary file, and are in memory where they were used last.

    Args:
        apart: the decoder; its tensors are stowed.
        room: shared with other steppers, one of which has its tensors in memory.
    """

    def __init__(self, apart: Apart, room: Room) -> None:
        super().__init__(apart.decoder)
        self._apart, self._room = apart, room
        apart.own.stow()

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """Run one block, with its tensors in memory."""
        self._room.fetch(self._apart)
        return super().run(index, hidden)


class Spanned:
    """Candidates that lack blocks, and in which each block that is left stands for those that are gone after it.

    Args:
        decoder: the model as it is; never edited.
        spans: by how many blocks one stands for, itself among them, a decoder of the same depth.
    """

    def __init__(self, decoder: Decoder, spans: Mapping[int, Decoder]) -> None:
        self._n_blocks = decoder.n_blocks
        self._first = {1: 0} | {length: place * decoder.n_blocks for place, length in enumerate(spans, 1)}
        self.steppers = [Stepper(each) for each in (decoder, *spans.values())]

    def path(self, candidate: Blocks) -> Path:
        """Return the blocks that are left, each from the decoder whose blocks lead to the next one's place."""
        kept = [index for index in range(self._n_blocks) if index not in candidate]
        return tuple(self._first[end - index] + index for index, end in pairwise([*kept, self._n_blocks]))


class Averaged:
    """Candidates that have averages in the place of groups of blocks; a candidate is what is joined to what is before.

    Args:
        decoder: the model as it is; never edited.
        at: which block of a group stands for all of them, where the others are gone; None keeps them all.

    Attributes:
        held: by group, a decoder of the same depth whose blocks of that group have its average.
    """

    def __init__(self, decoder: Decoder, at: Callable[[range], int] | None) -> None:
        self._own, self._at = Stepper(decoder), at
        self.held: dict[range, Stepper] = {}

    @property
    def steppers(self) -> Sequence[Stepper]:
        """The model's, and those that are held."""
        return [self._own, *self.held.values()]

    def groups(self, candidate: Blocks) -> list[range]:
        """Return the groups of two or more blocks, in order."""
        n = self._own.decoder.n_blocks
        firsts = [index for index in range(n) if index not in candidate]
        return [range(*each) for each in pairwise([*firsts, n]) if len(range(*each)) > 1]

    def path(self, candidate: Blocks) -> Path:
        """Return the model's own blocks, and in the place of each group those of the decoder that has its average."""
        n, held = self._own.decoder.n_blocks, list(self.held)
        stages = {index: index for index in range(n)}
        for group in self.groups(candidate):
            for index in group:
                stages[index] = n * (1 + held.index(group)) + index
                if self._at is not None and index != self._at(group):
                    del stages[index]
        return tuple(stages.values())


class Edited:
    """Candidates that lack blocks and are otherwise edited, each in a decoder of its own that is there for a while.

    Args:
        decoder: the model as it is; never edited.

    Attributes:
        held: by candidate, one that steps through the blocks that are left.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._own = Stepper(decoder)
        self.held: dict[Blocks, Stepper] = {}

    @property
    def steppers(self) -> Sequence[Stepper]:
        """The model's, and those that are held."""
        return [self._own, *self.held.values()]

    def path(self, candidate: Blocks) -> Path:
        """Return all blocks of a candidate's decoder."""
        n = self._own.decoder.n_blocks
        first = n * (1 + list(self.held).index(candidate))
        return tuple(range(first, first + n - len(candidate)))


def removable(decoder: Decoder, part: Part) -> tuple[int, ...]:
    """Return the blocks that a candidate can lack, or whose attention or FFN it can: those that are there."""
    gone = () if part == "block" else decoder.removed_parts[part]
    return tuple(index for index in range(decoder.n_blocks) if index not in gone)


Path = tuple[int, ...]
"""Stages in the order in which they are passed, as the indices of the blocks that are kept."""


def walk(paths: Iterable[Path], first: Tensor, step: Callable[[int, Tensor], Tensor]) -> Iterator[tuple[Path, Tensor]]:
    """Yield each path with the hidden states at its end, in lexical order.

    In that order the paths with a common prefix stand together, so that the states along the current path are all
    that is held: memory grows with the longest path, not with their number. Each distinct prefix is stepped through
    once: for all subsets of n blocks 2^n - 1 steps, where one by one they are n 2^(n - 1).

    Args:
        paths: distinct.
        first: what the first stage gets.
        step: passes hidden states through one stage and leaves what it is given as it is.
    """
    states = [first]
    current: Path = ()
    for path in sorted(paths):
        shared = _shared_length(current, path)
        del states[shared + 1 :]
        for stage in path[shared:]:
            states.append(step(stage, states[-1]))
        current = path
        yield path, states[-1]


def _shared_length(one: Path, two: Path) -> int:
    """Return how many stages two paths begin with in common."""
    length = 0
    for a, b in zip(one, two, strict=False):
        if a != b:
            break
        length += 1
    return length
