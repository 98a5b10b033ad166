"""Where a model comes from, and what made it."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerfold.environment import versions


@dataclass(frozen=True)
class Provenance:
    """The origin of a model and the steps that made it.

    Attributes:
        base: name by which the first model in the chain was loaded.
        revision: commit on the Hub, for a model from there.
        base_sha256: hash of the base's weights as loaded.
        steps: steps in order, each with the resolved method, its calibration text, its seed and its notes.
        versions: versions of layerfold and the packages it uses, at the last save.
        location: absolute path of the base, where it is a folder or a file; a checkpoint keeps it relative to itself,
            so that the two can be moved together.
    """

    base: str
    revision: str | None = None
    base_sha256: str | None = None
    steps: tuple[dict[str, Any], ...] = ()
    versions: dict[str, str] = field(default_factory=versions)
    location: str | None = None

    def to_json(self, folder: Path) -> dict[str, Any]:
        """Return the provenance as ``layerfold.json`` in this folder keeps it."""
        location = self.location
        if location is not None:
            with contextlib.suppress(ValueError):  # on Windows no path leads from one drive to another
                location = os.path.relpath(location, folder.resolve())
        return {**self.__dict__, "steps": list(self.steps), "versions": versions(), "location": location}

    @classmethod
    def from_json(cls, known: dict[str, Any], folder: Path) -> Provenance:
        """Return the provenance that `to_json` described.

        Raises:
            TypeError, KeyError: the document is something else.
        """
        location = known.get("location")
        located = None if location is None else os.path.normpath(folder.resolve() / location)
        return cls(**{**known, "steps": tuple(known["steps"]), "location": located})
