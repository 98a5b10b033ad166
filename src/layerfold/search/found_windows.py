"""What a search for a window of blocks to share leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from layerfold.search.found import Searched


@dataclass(frozen=True)
class Window:
    """Consecutive blocks that share their FFNs, measured on all of the selection text.

    Attributes:
        blocks: indices, in order; empty for the model as it is.
        perplexity: on the selection text.
        kl: mean over its tokens of KL(model as it is || with this window shared), in nats; nan where not measured.
        parameters: distinct ones.
    """

    blocks: tuple[int, ...]
    perplexity: float
    kl: float
    parameters: int

    @property
    def changed(self) -> tuple[int, ...]:
        """The blocks that it has otherwise than the model: all of the window."""
        return self.blocks

    @property
    def name(self) -> str:
        """The window as `Share` takes it, ``START:K``; empty for the model as it is."""
        return f"{self.blocks[0]}:{len(self.blocks)}" if self.blocks else ""


@dataclass(frozen=True, kw_only=True)
class FoundWindows(Searched[Window]):
    """What a search for a window to share found; ``best`` is by how many blocks share."""

    kind: ClassVar[str] = "window"

    def _row(self, window: Window) -> dict[str, Any]:
        return {"window": window.name, "blocks": list(window.blocks), **super()._row(window)}
