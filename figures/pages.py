"""Fills the blocks of README and docs from the results, or checks that they are filled from them.

A block stands between `<!-- figures: NAME -->` and `<!-- end of figures -->`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from figures.blocks import BLOCKS
from figures.experiments import ROOT
from layerfold.errors import InputError, one_of

_BLOCK = re.compile(r"<!-- figures: (\S+) -->\n(.*?)<!-- end of figures -->", re.DOTALL)


def pages() -> list[Path]:
    """Return the pages that have blocks."""
    candidates = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
    return [page for page in candidates if _BLOCK.search(page.read_text(encoding="utf-8"))]


def blocks(page: Path) -> list[str]:
    """Return the names of a page's blocks."""
    return [match[1] for match in _BLOCK.finditer(page.read_text(encoding="utf-8"))]


def filled(text: str) -> str:
    """Return a page with its blocks filled.

    Raises:
        InputError: a block that there is not.
    """

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if name not in BLOCKS:
            raise InputError(f"unknown block {one_of(name, BLOCKS)}")
        return f"<!-- figures: {name} -->\n{BLOCKS[name].text()}\n<!-- end of figures -->"

    return _BLOCK.sub(fill, text)


def fed() -> Mapping[str, list[str]]:
    """Return the pages that each experiment feeds."""
    found: dict[str, list[str]] = {}
    for page in pages():
        for name in blocks(page):
            for experiment in BLOCKS[name].experiments:
                where = found.setdefault(experiment, [])
                if (shown := str(page.relative_to(ROOT))) not in where:
                    where.append(shown)
    return found


def stale() -> Iterator[str]:
    """Yield the pages whose blocks are not what the results say."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if filled(text) != text:
            yield str(page.relative_to(ROOT))
