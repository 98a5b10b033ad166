"""What a block of a page is, and the blocks that there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from figures.experiments import EXPERIMENTS

Found = Mapping[str, Any]


@dataclass(frozen=True)
class Block:
    """A block of a page.

    Attributes:
        experiments: what it shows, by name.
        write: returns the Markdown, given the results.
    """

    experiments: tuple[str, ...]
    write: Callable[..., str]

    def text(self) -> str:
        """Return the Markdown, and below it the commands that made the figures."""
        found = {name: EXPERIMENTS[name].stored() for name in self.experiments}
        absent = [name for name, result in found.items() if result is None]
        if absent:
            return f"*Not measured yet with this version: `python -m figures run {' '.join(absent)}`.*"
        if not self.experiments:
            return self.write()
        commands = ", ".join(f"`{EXPERIMENTS[name].command}`" for name in self.experiments)
        stale = [name for name in self.experiments if not EXPERIMENTS[name].up_to_date()]
        devices = {result["device"] for result in found.values() if result is not None} - {"cpu"}
        said = f"Made by {commands}{''.join(f' on {device}' for device in sorted(devices))}."
        if not stale:
            return f"{self.write(*found.values())}\n\n{said}"
        said += f" Made by an earlier version: `python -m figures run {' '.join(stale)}` makes it again."
        try:
            return f"{self.write(*found.values())}\n\n{said}"
        except (KeyError, ValueError, TypeError):
            return said  # the earlier version had other rows


BLOCKS: dict[str, Block] = {}
"""By the name in a page."""


def block(name: str, *experiments: str) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Register what writes a block."""

    def register(write: Callable[..., str]) -> Callable[..., str]:
        BLOCKS[name] = Block(tuple(filter(None, experiments or (name,))), write)
        return write

    return register


PERPLEXITY = {"perplexity": "perplexity", "perplexity_ratio": "× base"}
SIZES = {"parameters": "parameters", "nonzero_parameters": "non-zero"}
SPEED = {"speedup": "speed-up"}
