"""Candidates as sequences of blocks from several decoders, and the walk that runs common beginnings once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

from torch import Tensor

from layerfold.inference.spool import Apart
from layerfold.inference.stepping import Stepper
from layerfold.methods.drop import Part
from layerfold.model.decoder import Decoder

Blocks = tuple[int, ...]
"""Indices of the blocks in which a candidate differs from the model, in order; none for the model itself."""

Path = tuple[int, ...]
"""Stages in the order in which they are passed."""


class Stages(ABC):
    """The model's decoder and others, whose blocks are numbered through as if all were of one depth.

    Args:
        decoder: the model's; never edited.

    Attributes:
        held: steppers through the other decoders, by what `_blocks` names them.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._own, self._n_blocks = Stepper(decoder), decoder.n_blocks
        self.held: dict[Hashable, Stepper] = {}

    @property
    def steppers(self) -> Sequence[Stepper]:
        """The model's, and those that are held."""
        return [self._own, *self.held.values()]

    def path(self, candidate: Blocks) -> Path:
        """Return the stages that a candidate passes."""
        first = {None: 0} | {name: place * self._n_blocks for place, name in enumerate(self.held, 1)}
        return tuple(first[name] + index for name, index in self._blocks(candidate))

    @abstractmethod
    def _blocks(self, candidate: Blocks) -> Iterator[tuple[Hashable, int]]:
        """Yield the blocks of a candidate: a decoder's name, None for the model's, and an index."""


class Lacking(Stages):
    """Candidates without some blocks, or without only their attention or FFN."""

    def __init__(self, decoder: Decoder, part: Part = "block") -> None:
        super().__init__(decoder)
        if part != "block":
            lacking = decoder.copy(share=True)
            lacking.remove_(part, removable(decoder, part))
            self.held["lacking"] = Stepper(lacking)

    def _blocks(self, candidate: Blocks) -> Iterator[tuple[Hashable, int]]:
        for index in range(self._n_blocks):
            if index not in candidate:
                yield None, index
            elif self.held:
                yield "lacking", index


class Replaced(Stages):
    """Candidates with the blocks of another decoder in place of the model's.

    One of the other decoders at a time has its own tensors in memory. In a walk the candidates come one after the
    other, so that each is read once for each batch of text.

    Args:
        others: by candidate, a decoder of the same depth beside the model's.
    """

    def __init__(self, decoder: Decoder, others: Mapping[Blocks, Apart]) -> None:
        super().__init__(decoder)
        room = Room()
        self.held |= {candidate: Fetched(apart, room) for candidate, apart in others.items()}

    def _blocks(self, candidate: Blocks) -> Iterator[tuple[Hashable, int]]:
        return ((candidate if index in candidate else None, index) for index in range(self._n_blocks))


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
    """Steps through a decoder whose own tensors wait in a temporary file while another one's are used.

    Args:
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


class Spanned(Stages):
    """Candidates without some blocks, in which each block that is left is refitted to replace the run after it.

    Args:
        spans: by length of the run, the block itself included, a decoder of the same depth.
    """

    def __init__(self, decoder: Decoder, spans: Mapping[int, Decoder]) -> None:
        super().__init__(decoder)
        self.held |= {length: Stepper(other) for length, other in spans.items()}

    def _blocks(self, candidate: Blocks) -> Iterator[tuple[Hashable, int]]:
        kept = [index for index in range(self._n_blocks) if index not in candidate]
        return ((end - index if end - index > 1 else None, index) for index, end in pairwise([*kept, self._n_blocks]))


class Averaged(Stages):
    """Candidates with averages in place of groups of blocks, each given as the blocks that join the one before them.

    The decoders in `held` are named by group; their blocks of that group have its average.

    Args:
        at: the one block of a group that is left; None keeps all of them.
    """

    def __init__(self, decoder: Decoder, at: Callable[[range], int] | None) -> None:
        super().__init__(decoder)
        self._at = at

    def groups(self, candidate: Blocks) -> list[range]:
        """Return the groups of two or more blocks, in order."""
        return [group for group in self._all_groups(candidate) if len(group) > 1]

    def _all_groups(self, candidate: Blocks) -> list[range]:
        firsts = [index for index in range(self._n_blocks) if index not in candidate]
        return [range(*bounds) for bounds in pairwise([*firsts, self._n_blocks])]

    def _blocks(self, candidate: Blocks) -> Iterator[tuple[Hashable, int]]:
        for group in self._all_groups(candidate):
            for index in group if len(group) == 1 or self._at is None else [self._at(group)]:
                yield group if len(group) > 1 else None, index


class Edited(Stages):
    """Candidates without some blocks and edited besides, each in a decoder of its own that `held` has for a while."""

    def _blocks(self, candidate: Blocks) -> Iterator[tuple[Hashable, int]]:
        return ((candidate, index) for index in range(self._n_blocks - len(candidate)))


def removable(decoder: Decoder, part: Part) -> tuple[int, ...]:
    """Return the blocks that can be removed, or whose attention or FFN can."""
    gone = () if part == "block" else decoder.removed_parts[part]
    return tuple(index for index in range(decoder.n_blocks) if index not in gone)


def walk(paths: Iterable[Path], first: Tensor, step: Callable[[int, Tensor], Tensor]) -> Iterator[tuple[Path, Tensor]]:
    """Yield each path with the hidden states at its end, in lexical order.

    In that order paths with a common prefix follow each other, so only the states along the current path are held:
    memory grows with the longest path, not with the number of paths. Each distinct prefix is stepped through once: for
    all subsets of n blocks 2^n - 1 steps, where one by one they are n 2^(n - 1).

    Args:
        paths: distinct.
        first: input of the first stage.
        step: passes hidden states through one stage, without writing into them.
    """
    states = [first]
    current: Path = ()
    for path in sorted(paths):
        both = enumerate(zip(current, path, strict=False))
        shared = next((place for place, (one, two) in both if one != two), min(len(current), len(path)))
        del states[shared + 1 :]
        for stage in path[shared:]:
            states.append(step(stage, states[-1]))
        current = path
        yield path, states[-1]
