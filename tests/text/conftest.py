"""A Hub that answers from memory: no test may reach the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import pytest

from layerfold.text import sources


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], list[Any]]:
    """Let `load_dataset` answer with rows, or columns, by split; return the list of what it is asked for."""

    def hub(content: dict[str, Any]) -> list[Any]:
        asked: list[Any] = []
        columns = {split: rows if isinstance(rows, dict) else {"text": rows} for split, rows in content.items()}
        tables = {split: datasets.Dataset.from_dict(each) for split, each in columns.items()}
        monkeypatch.setattr(
            datasets, "load_dataset", lambda *name, **_: asked.append(name) or datasets.DatasetDict(tables)
        )
        monkeypatch.setattr(sources, "hub_reachable", lambda: True)
        return asked

    return hub
