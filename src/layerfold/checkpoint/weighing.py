"""What a model's weights take on disk, in either form, without writing them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from layerfold.checkpoint.structure import outline
from layerfold.model import masks
from layerfold.model.decoder import Decoder


@dataclass(frozen=True)
class Weighed:
    """Bytes of a model's weights in files, whose headers are left out.

    Attributes:
        dense: in the form that plain transformers loads: with zeros for what single blocks lack, tied FFNs as copies
            and deltas multiplied out.
        compact: with each distinct tensor once.
    """

    dense: int
    compact: int

    @property
    def as_small(self) -> bool:
        """Whether the dense form holds nothing that the compact one does not."""
        return self.dense <= self.compact

    def said(self, before: Weighed) -> str:
        """Write what became of the sizes, in megabytes of a million bytes."""
        if before.as_small and self.as_small:
            return _change(before.dense, self.dense)
        return f"dense {_change(before.dense, self.dense)}, compact {_change(before.compact, self.compact)}"


def weigh(decoder: Decoder, dtype: torch.dtype) -> Weighed:
    """Weigh a model whose weights would be saved in a dtype."""
    dense, compact = dense_parameters(decoder) * dtype.itemsize, parameters(decoder) * dtype.itemsize
    for mask in masks.held(decoder).values():
        bits = math.ceil(mask.numel() / 8)
        dense += bits
        compact += bits - int((~mask).sum()) * dtype.itemsize
    return Weighed(dense, compact)


def parameters(decoder: Decoder) -> int:
    """Count distinct parameters."""
    return sum(each.numel() for each in decoder.model.parameters())


def dense_parameters(decoder: Decoder) -> int:
    """Count the parameters of the dense form: those of a model of this configuration."""
    return sum(each.numel() for each in outline(decoder.model).parameters())


def _change(before: int, after: int) -> str:
    return " -> ".join(f"{count / 1e6:,.2f} MB" for count in dict.fromkeys((before, after)))
