"""How long work says where it stands, without knowing who shows it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """One of several unequal pieces of work.

    Attributes:
        description: what is being done.
        weight: how long it takes, relative to the others.
        payload: what the caller needs to do it.
    """

    description: str
    weight: float
    payload: Any = None


class Progress(Protocol):
    """Something that shows work in progress; the command line passes one that draws bars."""

    def track(self, items: Iterable[T], description: str, total: float | None = None) -> Iterable[T]:
        """Yield the items, showing what is being done and how far it is; a `Step` counts by its weight."""
        ...

    def doing(self, description: str) -> AbstractContextManager[None]:
        """Show what is being done while the block runs, where how far it is cannot be known."""
        ...

    def note(self, line: str) -> None:
        """Show a line that stays."""
        ...

    def result(self, line: str) -> None:
        """Show a result that stays, as soon as there is one."""
        ...


class Silent:
    """Shows nothing."""

    def track(self, items: Iterable[T], description: str, total: float | None = None) -> Iterable[T]:
        """Yield the items."""
        return items

    def doing(self, description: str) -> AbstractContextManager[None]:
        """Do nothing."""
        return nullcontext()

    def note(self, line: str) -> None:
        """Do nothing."""

    def result(self, line: str) -> None:
        """Do nothing."""


SILENT = Silent()
