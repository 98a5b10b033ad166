"""What the searches of this folder find, made once."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from tiny import tiny

from layerfold.search.run import Search


@pytest.fixture(scope="session")
def searched() -> Any:
    """What a search finds of a tiny model, without a folder; each is run once."""

    @functools.cache
    def searched(search: Search[Any], name: str = "gpt2", **model: Any) -> Any:
        return search(tiny(name, **model))

    return searched
