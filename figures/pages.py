"""Fills the blocks of README and docs from the results, or checks that they are filled from them.

A block stands between `<!-- figures: NAME -->` and `<!-- end of figures -->`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from figures.blocks import BLOCKS, Block
from figures.experiments import ROOT
from layerfold.errors import InputError, one_of

_BEGIN, _END = re.compile(r"<!-- figures: (\S+) -->"), "<!-- end of figures -->"
_BLOCK = re.compile(rf"{_BEGIN.pattern}\n(.*?){_END}", re.DOTALL)


def pages() -> list[Path]:
    """Return the pages that have blocks."""
    candidates = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
    return [page for page in candidates if _BEGIN.search(page.read_text(encoding="utf-8"))]


def blocks(page: Path) -> list[str]:
    """Return the names of a page's blocks."""
    return [match[1] for match in _BLOCK.finditer(page.read_text(encoding="utf-8"))]


def filled(text: str) -> str:
    """Return a page with its blocks filled.

    Raises:
        InputError: a block that there is not, or one without its end.
    """
    whole = _BLOCK.findall(text)
    if any(_BEGIN.search(inside) for _, inside in whole) or len(whole) != len(_BEGIN.findall(text)):
        raise InputError(f"a block without its end; accepted: {_END!r} after each block, before the next")

    def fill(match: re.Match[str]) -> str:
        return f"<!-- figures: {match[1]} -->\n{_block(match[1]).text()}\n{_END}"

    return _BLOCK.sub(fill, text)


def _block(name: str) -> Block:
    if name not in BLOCKS:
        raise InputError(f"unknown block {one_of(name, BLOCKS)}")
    return BLOCKS[name]


def fed() -> Mapping[str, list[str]]:
    """Return the pages that each experiment feeds."""
    found: dict[str, list[str]] = {}
    for page in pages():
        for name in blocks(page):
            for experiment in _block(name).experiments:
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
