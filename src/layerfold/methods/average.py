"""What the methods that average groups of FFNs share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from layerfold.calibration import Calibration, Pair, check_widths
from layerfold.errors import InputError, nearest
from layerfold.maths.linalg import Match
from layerfold.methods import base
from layerfold.methods.base import AUTO, Method, Notes, Searched
from layerfold.model.decoder import Decoder
from layerfold.model.ffn import FFN

_N = 2


@dataclass(frozen=True)
class GroupAverage(Method):
    """Average the FFNs of groups of consecutive blocks.

    Neurons are first reordered to match the anchor's by the correlation of their activations; then all of the FFN,
    weights and biases, is averaged. A gated FFN computes the same with a neuron's rows of `up` and `down` negated:
    there neurons are matched by the absolute correlation, and flipped where it is negative.

    Blocks outside the groups are left alone. A search compares all groupings that leave as many FFNs or blocks.

    Attributes:
        n: number of blocks in a group, counted from block 0; the last group may be shorter.
        groups: instead of `n`, first and last block of each group, as ``1-4,5-8``; or ``auto``, a search for as many
            groups as `n` (2 by default) makes.
        align: reorder neurons to match the anchor's, or average them in the order they have.
        anchor: block of each group that the others are aligned to.

    Source: Verma and Elbayad, "Merging Feed-Forward Sublayers for Compressed Transformers", 2025, section 3, which
    flips none.
    """

    n: int | None = None
    groups: str | None = None
    align: Literal["hungarian", "none"] = "hungarian"
    anchor: Literal["first", "middle", "last"] = "first"
    rescales: ClassVar[bool] = True

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
    def searched(self) -> Searched:
        """The groups, where they are ``auto``."""
        return "groups" if self.groups == AUTO else ""

    def outline(self) -> GroupAverage:
        """Return the same without alignment."""
        return replace(self, align="none")

    @classmethod
    def told(cls, resolved: Mapping[str, Any], notes: Mapping[str, Any]) -> Iterator[str]:
        """Say how well neurons were matched, and what a search scored."""
        yield from base.told_of_pairs(notes)
        yield from base.told_of_search("groups", notes)
        if "search" in notes:
            yield f"groups {resolved['groups']} are the best of {notes['search']['scored']} groupings scored"

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
            raise InputError(f"n {self.size} for a model of {base.said_depth(n_blocks, 'be grouped with')}")

    def resolved(self, decoder: Decoder) -> dict[str, Any]:
        """Return the configuration with the groups spelled out; where they are to be searched, ``auto`` beside `n`."""
        settings: dict[str, Any] = {"name": self.name}
        if self.groups == AUTO:
            self.joinable(decoder)
            settings |= {"groups": AUTO, "n": self.size}
        else:
            settings |= {"groups": spelled(self.group_indices(decoder.n_blocks))}
        return settings | {"align": self.align, "anchor": self.anchor}

    def anchor_of(self, group: range) -> int:
        """Return the index of a group's anchor."""
        return base.anchor_of(group, self.anchor)

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
            with decoder.resident([anchor], edited=True):
                # Float32 sums, so that averaging half-precision weights does not round at each step.
                sums = [tensor.float().clone() for tensor in ffns[anchor].tensors()]
                for other in group:
                    if other != anchor:
                        match = matches.get((anchor, other))
                        with decoder.resident([other]):
                            _add_(sums, ffns[other], match)
                ffns[anchor].copy_([total.div_(len(group)) for total in sums])
        return {"pairs": base.described(matches)}


def _add_(sums: Iterable[Tensor], ffn: FFN, match: Match | None) -> None:
    for total, tensor in zip(sums, ffn.tensors(*(() if match is None else (match.order, match.signs))), strict=True):
        total += tensor


def spelled(groups: Iterable[range]) -> str:
    """Return groups as the setting spells them."""
    return ",".join(f"{group[0]}-{group[-1]}" for group in groups)


def _parse(groups: str) -> list[range]:
    if guess := nearest(groups.lower(), [AUTO]):
        raise InputError(f"groups {groups!r}; {guess}accepted: auto, or first-last blocks, as in '1-4,5-8'")
    return base.parse_ranges(groups, "group", "first-last block of two or more, as in '1-4,5-8', or auto", shortest=2)
