"""The tables of a search for a window of blocks to share, as the terminal and the page read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from layerfold.report.provenance import listing
from layerfold.report.search import (
    KL,
    NONE,
    PARAMETERS,
    PERPLEXITY,
    RATIO,
    REMOVED,
    TEST_PERPLEXITY,
    TEST_RATIO,
    SearchColumn,
    cells,
    ranked,
)
from layerfold.report.tables import DASH, Table
from layerfold.search import FoundWindows, Window

WindowColumn = SearchColumn[FoundWindows, Window]


def name(window: Window) -> str:
    """Write a window as a recipe takes it."""
    return window.name or NONE


def spanned(window: Window) -> str:
    """Write the first and the last block of a window."""
    return f"{window.blocks[0]}{DASH}{window.blocks[-1]}" if window.blocks else ""


def best_windows(found: FoundWindows) -> list[Window]:
    """Return the best window of each size, the smallest first."""
    return [found.best[size] for size in sorted(found.best)]


def sharing(found: FoundWindows) -> str:
    """Write how the blocks share: ``rank 8, base fitted, ...``."""
    ((_, phrase),) = listing({"share": found.settings.get("share")})
    return phrase


def windows_table(found: FoundWindows, most: int) -> Table:
    """Return the base and the candidates in their order; of more than so many, the best."""
    kept = {window.blocks for window in ranked(found, found.candidates)[:most]}
    columns: tuple[WindowColumn, ...] = (PARAMETERS, REMOVED, PERPLEXITY, RATIO, KL)
    return _table(found, columns, [found.base, *(each for each in found.candidates if each.blocks in kept)])


def best_windows_table(found: FoundWindows) -> Table:
    """Return the base and the best window of each size, with what they score on the test text."""
    chosen_on = replace(PERPLEXITY, unit="selection")
    columns: tuple[WindowColumn, ...] = (PARAMETERS, REMOVED, chosen_on, TEST_PERPLEXITY, TEST_RATIO)
    return _table(found, columns, [found.base, *best_windows(found)])


def _table(found: FoundWindows, columns: Sequence[WindowColumn], windows: Sequence[Window]) -> Table:
    labels = [f"{name(window)} ({spanned(window)})" if window.blocks else NONE for window in windows]
    rows = [(label, cells(found, window, columns)) for label, window in zip(labels, windows, strict=True)]
    return Table("window (blocks)", NONE, columns, rows)
