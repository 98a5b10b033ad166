"""What all methods are, and what those that average groups of FFNs share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, Protocol

import torch

from layerfold.calibration import Calibration, Pair, check_widths
from layerfold.errors import InputError, nearest
from layerfold.maths.linalg import Match
from layerfold.model.decoder import Decoder

Notes = dict[str, Any]
"""What a method found while it worked, as JSON: never what it saved, which the study measures."""

AUTO = "auto"
"""Stands for what a search is to find."""

_N = 2


class Method(Protocol):
    """A way to make a decoder smaller; a frozen dataclass whose fields are its configuration."""

    name: ClassVar[str]
    version: ClassVar[int]
    """Raised when the same settings come to other weights, so that kept records of the old ones are made again."""

    @property
    def needs_calibration(self) -> bool:
        """Whether `apply` reads activations."""
        ...

    def resolved(self, decoder: Decoder) -> dict[str, Any]:
        """Return the full configuration as JSON, defaults and groups spelled out for this decoder.

        Raises:
            InputError: a setting that it does not admit.
        """
        ...

    def apply(self, decoder: Decoder, calibration: Calibration | None) -> Notes:
        """Edit the decoder in place."""
        ...


@dataclass(frozen=True)
class GroupAverage:
    """Average the FFNs of groups of consecutive blocks.

    Neurons are first reordered to match the anchor's by the correlation of their activations; then all of the FFN,
    weights and biases, is averaged. A gated FFN computes the same with a neuron's rows of `up` and `down` negated:
    there neurons are matched by the absolute correlation, and flipped where it is negative.

    Attributes:
        n: group size; the groups are consecutive from block 0, the last one shorter where the depth is no multiple.
        groups: instead of `n`, inclusive ranges of block indices as ``"1-4,5-8"``; other blocks are left alone. Or
            ``auto``: of all groupings that leave as many FFNs or blocks as groups of `n` would (2 where it is None),
            the best that a search finds.
        align: ``hungarian``, or ``none`` to average neurons in the order they have.
        anchor: the block of each group that the others are aligned to.

    Source: Verma and Elbayad, "Merging Feed-Forward Sublayers for Compressed Transformers", 2025, section 3, which
    flips none.
    """

    n: int | None = None
    groups: str | None = None
    align: Literal["hungarian", "none"] = "hungarian"
    anchor: Literal["first", "middle", "last"] = "first"

    def __post_init__(self) -> None:
        if (self.n is None) == (self.groups is None) and self.groups != AUTO:
            raise InputError(f"n {self.n} and groups {self.groups!r}; accepted: one of the two, or n with groups auto")
        if self.n is not None and self.n < 2:
            raise InputError(f"n {self.n}; accepted: a whole number from 2 to the model's depth")
        if self.align not in ("hungarian", "none"):
            raise InputError(f"align {self.align!r}; accepted: hungarian, none")
        if self.anchor not in ("first", "middle", "last"):
            raise InputError(f"anchor {self.anchor!r}; accepted: first, middle, last")
        if self.groups is not None and self.groups != AUTO:
            _parse(self.groups)

    @property
    def needs_calibration(self) -> bool:
        """Whether neurons are aligned."""
        return self.align == "hungarian"

    @property
    def size(self) -> int:
        """The group size that says how many groups a search leaves."""
        return _N if self.n is None else self.n

    def group_indices(self, n_blocks: int) -> list[range]:
        """Return each group of two or more blocks.

        Raises:
            InputError: they are to be searched, or are none of the model's.
        """
        if self.groups == AUTO:
            raise InputError("groups auto, and nothing has searched for them; accepted: n, or ranges as '1-4,5-8'")
        if self.n is not None:
            self._check_depth(n_blocks)
            groups = [range(first, min(first + self.n, n_blocks)) for first in range(0, n_blocks, self.n)]
        else:
            groups = _parse(self.groups or "")
            if groups[-1].stop > n_blocks:
                raise InputError(f"groups {self.groups!r} for a model of blocks 0 ... {n_blocks - 1}")
        return [group for group in groups if len(group) > 1]

    def joinable(self, decoder: Decoder) -> list[int]:
        """Return the blocks that a search may join to the one before them: those whose FFNs have an average.

        Raises:
            InputError: they are too few to leave no more groups than `size` says, or that is beyond the depth.
        """
        depth = decoder.n_blocks
        self._check_depth(depth)
        found, refusals = [], []
        for index in range(1, depth):
            try:
                check_widths(decoder, [(index - 1, index)])
                found.append(index)
            except InputError as error:
                refusals.append(str(error))
        if depth - len(found) > (left := len(range(0, depth, self.size))):
            raise InputError(
                f"groups auto with n {self.size} would leave {left} of {depth} blocks, and no fewer than "
                f"{depth - len(found)} can be left: {refusals[0]}"
            )
        return found

    def _check_depth(self, n_blocks: int) -> None:
        if self.size > n_blocks:
            raise InputError(f"n {self.size} for a model of {_blocks(n_blocks)}")

    def resolved(self, decoder: Decoder) -> dict[str, Any]:
        """Return the configuration with the groups spelled out; where they are to be searched, ``auto`` beside `n`."""
        settings: dict[str, Any]
        if self.groups == AUTO:
            self.joinable(decoder)
            settings = {"groups": AUTO, "n": self.size}
        else:
            settings = {"groups": spelled(self.group_indices(decoder.n_blocks))}
        return settings | {"align": self.align, "anchor": self.anchor}

    def anchor_of(self, group: range) -> int:
        """Return the index of a group's anchor."""
        return group[{"first": 0, "middle": (len(group) - 1) // 2, "last": -1}[self.anchor]]

    def pairs(self, group: range) -> list[Pair]:
        """Return a group's anchor with each of the others."""
        anchor = self.anchor_of(group)
        return [(anchor, other) for other in group if other != anchor]

    def members(self, decoder: Decoder, calibration: Calibration | None) -> dict[int, list[tuple[int, Match | None]]]:
        """For each block that gets an average: the blocks that it is of, with how their neurons were matched."""
        matches = self._matches(decoder, calibration)
        found: dict[int, list[tuple[int, Match | None]]] = {}
        for group in self.group_indices(decoder.n_blocks):
            anchor = self.anchor_of(group)
            found |= {index: [(other, matches.get((anchor, other))) for other in group] for index in group}
        return found

    def _matches(self, decoder: Decoder, calibration: Calibration | None) -> dict[Pair, Match]:
        """How the neurons of each group's blocks answer to its anchor's; nothing where they are not reordered."""
        pairs = [pair for group in self.group_indices(decoder.n_blocks) for pair in self.pairs(group)]
        check_widths(decoder, pairs)
        if not self.needs_calibration:
            return {}
        if calibration is None:
            raise InputError("align 'hungarian' needs calibration text; give a corpus, or align none")
        return calibration.matches(pairs)

    @torch.no_grad()
    def average_(self, decoder: Decoder, calibration: Calibration | None) -> Notes:
        """Overwrite each anchor's FFN by its group's average."""
        groups = self.group_indices(decoder.n_blocks)
        matches = self._matches(decoder, calibration)
        ffns = {index: decoder.blocks[index].ffn for group in groups for index in group}
        # An FFN tied by an earlier merge parts from its twins: writing into it must not reach another block.
        tied = {index for blocks in decoder.blocks_by_ffn if len(blocks) > 1 for index in blocks}
        for index in tied & ffns.keys():
            ffns[index].own_()
        for group in groups:
            anchor = self.anchor_of(group)
            # Float32 sums, so that averaging half-precision weights does not round at each step.
            sums = [tensor.float().clone() for tensor in ffns[anchor].tensors()]
            for other in group:
                if other != anchor:
                    match = matches.get((anchor, other))
                    tensors = ffns[other].tensors() if match is None else ffns[other].tensors(match.order, match.signs)
                    for total, tensor in zip(sums, tensors, strict=True):
                        total += tensor
            ffns[anchor].copy_([total.div_(len(group)) for total in sums])
        return {"pairs": described(matches)}


def spelled(groups: Iterable[range]) -> str:
    """Return groups as the setting spells them."""
    return ",".join(f"{group[0]}-{group[-1]}" for group in groups)


def described(matches: Mapping[Pair, Match]) -> list[dict[str, Any]]:
    """Return how well each pair of blocks was matched, as JSON."""
    return [
        {
            "anchor": anchor,
            "block": other,
            "correlation": match.mean_correlation,
            "unaligned": match.mean_correlation_unaligned,
        }
        for (anchor, other), match in matches.items()
    ]


def _blocks(n_blocks: int) -> str:
    """Say a depth, and what group sizes it admits."""
    return (
        "1 block, which has none to be grouped with"
        if n_blocks == 1
        else f"{n_blocks} blocks; accepted: 2 ... {n_blocks}"
    )


def _parse(groups: str) -> list[range]:
    if guess := nearest(groups.lower(), [AUTO]):
        raise InputError(f"groups {groups!r}; {guess}accepted: auto, or first-last blocks, as in '1-4,5-8'")
    return parse_ranges(groups, "group", "first-last block of two or more, as in '1-4,5-8', or auto", shortest=2)


def parse_ranges(text: str, kind: str, accepted: str, *, shortest: int) -> list[range]:
    """Parse inclusive ranges of block indices, as ``"0,2-4"``, in order and disjoint.

    Raises:
        InputError: a part that is no range of the shortest length, or an index that two of them hold.
    """
    parsed = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", part)
        if not match or int(match[2] or match[1]) < int(match[1]) + shortest - 1:
            raise InputError(f"{kind} {part!r}; accepted: {accepted}")
        parsed.append(range(int(match[1]), int(match[2] or match[1]) + 1))
    parsed.sort(key=lambda group: group.start)
    for one, two in pairwise(parsed):
        if two.start < one.stop:
            raise InputError(f"{kind}s {text!r} name block {two.start} twice")
    return parsed
