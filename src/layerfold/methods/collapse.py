"""Collapse: a group of blocks becomes one block with the average of their FFNs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from layerfold.calibration import Calibration
from layerfold.methods.base import GroupAverage, Notes
from layerfold.model.decoder import Decoder


@dataclass(frozen=True)
class Collapse(GroupAverage):
    """Replace each group of blocks by one with the average of their FFNs.

    The block that stays is the group's anchor.
    """

    name: ClassVar[str] = "collapse"
    version: ClassVar[int] = 2

    def resolved(self, decoder: Decoder) -> dict[str, Any]:
        """Return the full configuration; see `GroupAverage.resolved`."""
        return {"name": self.name, **super().resolved(decoder)}

    def apply(self, decoder: Decoder, calibration: Calibration | None) -> Notes:
        """Edit the decoder in place."""
        groups = self.group_indices(decoder.n_blocks)
        notes = self.average_(decoder, calibration)
        removed = {index for group in groups for index in group if index != self.anchor_of(group)}
        decoder.keep_([index for index in range(decoder.n_blocks) if index not in removed])
        return notes
