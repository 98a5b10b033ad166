"""Merge: the FFNs of a group become one average; the depth stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from layerfold.calibration import Calibration
from layerfold.methods.average import GroupAverage
from layerfold.methods.base import Notes
from layerfold.model.decoder import Decoder


@dataclass(frozen=True)
class Merge(GroupAverage):
    """Give each block of a group the average of the group's FFNs.

    Depth, norms and attention stay. The published code gave the average to the first block of each group only; its
    description, and this, to all.

    Attributes:
        tie: store one FFN for each group, which a compact checkpoint keeps once.
    """

    tie: bool = False
    name: ClassVar[str] = "merge"
    version: ClassVar[int] = 2

    def resolved(self, decoder: Decoder) -> dict[str, Any]:
        """Return the full configuration; see `GroupAverage.resolved`."""
        return {**super().resolved(decoder), "tie": self.tie}

    @property
    def said(self) -> str:
        """The method in a phrase."""
        return super().said.replace("tie=True", "tied")

    @classmethod
    def ladder(cls, depth: int) -> list[Merge]:
        """Return every group size, tied: otherwise nothing is smaller."""
        return [cls(n=n, tie=True) for n in range(2, depth + 1)]

    def apply(self, decoder: Decoder, calibration: Calibration | None) -> Notes:
        """Edit the decoder in place."""
        notes = self.average_(decoder, calibration)
        for group in self.group_indices(decoder.n_blocks):
            anchor = decoder.blocks[self.anchor_of(group)].ffn
            for index in group:
                ffn = decoder.blocks[index].ffn
                if self.tie:
                    ffn.tie_(anchor)
                elif index != self.anchor_of(group):
                    ffn.copy_(anchor.tensors())
        return notes
