"""What the methods that average groups of FFNs share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from layerfold.calibration import Calibration, Pair, check_widths
from layerfold.errors import InputError, nearest
from layerfold.maths.linalg import Match
from layerfold.methods import base, fitting
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
        average: the mean of the weights, as published, or the weights fitted to what each FFN did on its own inputs.

    Source: Verma and Elbayad, "Merging Feed-Forward Sublayers for Compressed Transformers", 2025, section 3, which
    flips none. For the fitted weights see `fitting`.
    """

    n: int | None = None
    groups: str | None = None
    align: Literal["hungarian", "none"] = "hungarian"
    anchor: Literal["first", "middle", "last"] = "first"
    average: Literal["mean", "fitted"] = "mean"
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
        if self.average not in ("mean", "fitted"):
            raise InputError(f"average {self.average!r}; accepted: mean, fitted")
        if self.groups is not None and self.groups != AUTO:
            _parse(self.groups)

    @property
    def needs_calibration(self) -> bool:
        """Whether neurons are aligned, or weights fitted."""
        return self.align == "hungarian" or self.average == "fitted"

    def settings(self) -> dict[str, Any]:
        """Return the settings; an average by the mean is not among them, as it was before there was another."""
        return self._told(super().settings())

    def to_json(self) -> dict[str, Any]:
        """Return the method as recipes write it."""
        return {self.name: self._told(super().to_json()[self.name])}

    def _told(self, settings: dict[str, Any]) -> dict[str, Any]:
        return settings if self.average != "mean" else {k: v for k, v in settings.items() if k != "average"}

    @property
    def searched(self) -> Searched:
        """The groups, where they are ``auto``."""
        return "groups" if self.groups == AUTO else ""

    def outline(self) -> GroupAverage:
        """Return the same without what reads text."""
        return replace(self, align="none", average="mean")

    @classmethod
    def told(cls, resolved: Mapping[str, Any], notes: Mapping[str, Any]) -> Iterator[str]:
        """Say how well neurons were matched, what fits miss, and what a search scored."""
        yield from base.told_of_pairs(notes)
        for fit in notes.get("fits", []):
            mean, fitted = (f"{100 * fit['matrices'][-1][name]:.1f}%" for name in ("mean", "fitted"))
            yield f"block {fit['block']:>2}: its fitted FFN misses {fitted} of what it should put out, the mean {mean}"
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
        settings |= {"align": self.align, "anchor": self.anchor}
        return settings if self.average == "mean" else settings | {"average": self.average}

    def anchor_of(self, group: range) -> int:
        """Return the index of a group's anchor."""
        return base.anchor_of(group, self.anchor)

    def written(self, group: range) -> Sequence[int]:
        """Return the blocks of a group whose FFNs `average_` writes into."""
        # Groups behind one that is fitted are to see it as it will be.
        return group if self.average == "fitted" and not self.removes_blocks else [self.anchor_of(group)]

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
        if self.needs_calibration and calibration is None:
            why, other = ("align", ", or align none") if self.average == "mean" else ("average", "")
            raise InputError(f"{why} {getattr(self, why)!r} needs calibration text; give a corpus{other}")
        if self.align == "none" or calibration is None:
            return {}
        return calibration.matches(pairs)

    @torch.no_grad()
    def average_(self, decoder: Decoder, calibration: Calibration | None) -> Notes:
        """Overwrite each anchor's FFN by its group's average, or where it is fitted all that stay."""
        groups = self.group_indices(decoder.n_blocks)
        matches = self._matches(decoder, calibration)
        ffns = {index: decoder.blocks[index].ffn for group in groups for index in group}
        # An FFN tied by an earlier merge parts from its twins: writing into it must not reach another block.
        tied = {index for blocks in decoder.blocks_by_ffn if len(blocks) > 1 for index in blocks}
        for index in tied & ffns.keys():
            ffns[index].own_()
        notes: Notes = {"pairs": base.described(matches)}
        if self.average == "fitted":
            assert calibration is not None
            notes["fits"] = []
            anchors = [self.anchor_of(group) for group in groups]
            for fitted in fitting.fit(decoder, groups, anchors, matches, calibration, collapse=self.removes_blocks):
                for index in self.written(groups[anchors.index(fitted.anchor)]):
                    ffns[index].copy_(fitted.tensors)
                notes["fits"].append(fitted.notes)
            return notes
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
        return notes


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
