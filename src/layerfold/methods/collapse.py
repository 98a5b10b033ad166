"""Collapse: a group of blocks becomes one block with the average of their FFNs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from layerfold.calibration import Calibration
from layerfold.methods.average import GroupAverage
from layerfold.methods.base import Notes
from layerfold.model.decoder import Decoder


@dataclass(frozen=True)
class Collapse(GroupAverage):
    """Replace each group of blocks by one with the average of their FFNs.

    The block that stays is the group's anchor.
    """

    name: ClassVar[str] = "collapse"
    version: ClassVar[int] = 2
    removes_blocks: ClassVar[bool] = True

    @classmethod
    def ladder(cls, depth: int) -> list[Collapse]:
        """Return every group size."""
        return [cls(n=n) for n in range(2, depth + 1)]

    def apply(self, decoder: Decoder, calibration: Calibration | None) -> Notes:
        """Edit the decoder in place."""
        groups = self.group_indices(decoder.n_blocks)
        notes = self.average_(decoder, calibration)
        removed = {index for group in groups for index in group if index != self.anchor_of(group)}
        decoder.keep_([index for index in range(decoder.n_blocks) if index not in removed])
        return notes
