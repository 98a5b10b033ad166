"""Models that wait until they are measured side by side, within a bound on memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerfold.checkpoint.model import Model
from layerfold.inference.spool import Apart
from layerfold.memory import room
from layerfold.methods.base import Notes
from layerfold.model import deltas
from layerfold.model.decoder import Decoder
from layerfold.records import BASE_LABEL


@dataclass(frozen=True, eq=False)
class _Waiting:
    model: Model
    notes: Notes
    apart: Apart
    bytes: int  # of its weights while it is measured


class Waiting:
    """Models of a study that are built and still to be compared.

    The weights of those that fit together stay in memory. The others' are in temporary files and come back to the bit,
    in groups that fit. The base is in memory throughout and belongs to every group.

    Args:
        base: what the others are compared with.
        limit: bytes of memory for the weights of the others; a model that is larger is a group by itself. None takes
            half of the memory that is free now, less a copy of the base.
    """

    def __init__(self, base: Model, limit: int | None = None) -> None:
        self._given = self._base = base
        self._base_notes = Notes()
        # A comparison makes a copy of the base, to measure the same model twice.
        device = base.decoder.device
        free = room.available() if device.type == "cpu" else room.free(device)
        self._limit = max(0, free // 2 - _bytes(base.decoder)) if limit is None else limit
        self._models: dict[str, _Waiting] = {}

    def add(self, label: str, model: Model, notes: Notes) -> None:
        """Keep a model, which nothing writes into from now on.

        Raises:
            OutputError: its weights do not fit in memory, and not in a temporary file.
        """
        if label == BASE_LABEL:
            self._base, self._base_notes = model, notes
            return
        apart = Apart(model.decoder, self._given.decoder, self._base.decoder)
        added = _Waiting(model, notes, apart, apart.own.bytes + _multiplied_out(model.decoder))
        if not self._fit([*(each for each in self._models.values() if each.apart.own.here), added]):
            apart.own.stow()
        self._models[label] = added

    def notes(self, label: str) -> Notes:
        """Return the notes from building a model."""
        return self._base_notes if label == BASE_LABEL else self._models[label].notes

    def groups(self, labels: Sequence[str]) -> list[list[str]]:
        """Divide models into groups that fit in memory, in order. The base is in none; alone it has an empty group."""
        groups: list[list[str]] = [[]]
        for label in labels:
            if label == BASE_LABEL:
                continue
            if groups[-1] and not self._fit([self._models[each] for each in (*groups[-1], label)]):
                groups.append([])
            groups[-1].append(label)
        return groups

    def together(self, group: Sequence[str]) -> dict[str, Model]:
        """Return the base and a group of models, with their weights in memory.

        Raises:
            OutputError: the weights of the others do not fit in a temporary file.
        """
        mine = [self._models[label] for label in group]
        if not self._fit(list(self._models.values())):
            for each in self._models.values():
                if each not in mine:
                    each.apart.own.stow()
        for each in mine:
            each.apart.own.fetch()
        return {BASE_LABEL: self._base} | {label: self._models[label].model for label in group}

    def drop(self, group: Sequence[str]) -> None:
        """Free models that are no longer needed."""
        for label in group:
            del self._models[label]
        room.release()

    def _fit(self, models: Sequence[_Waiting]) -> bool:
        return sum(each.bytes for each in models) <= self._limit


def _bytes(decoder: Decoder) -> int:
    """Bytes of a decoder's distinct parameters."""
    return sum(parameter.nbytes for parameter in decoder.model.parameters())


def _multiplied_out(decoder: Decoder) -> int:
    """Bytes of the matrices with low-rank deltas multiplied out, which are measured beside them."""
    return sum(
        module.weight.nbytes + (0 if module.bias is None else module.bias.nbytes)
        for module in deltas.factored(decoder).values()
    )
