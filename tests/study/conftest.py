"""Fixtures for tests of studies."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def _quick_collection() -> Iterator[None]:
    """Keep what is imported out of the garbage collections that trainings and comparisons begin with: most of them."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
