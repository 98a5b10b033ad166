"""A text for the searches of this folder, and what they find, made once."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from tiny import prose, tiny

from layerfold.search.run import Search
from layerfold.text.sources import disjoint


@pytest.fixture(scope="session")
def study_corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file of the fixture of this name above this folder, made once."""
    documents = [prose(30, seed) for seed in range(120)]
    kept, _ = disjoint({"all": documents}, str)
    counts = {"test": 6, "validation": 6, "calibration": 3, "train": 45}
    chosen = {document for split, count in counts.items() for document in kept[split][:count]}
    path = tmp_path_factory.mktemp("text") / "study.txt"
    path.write_text("\n\n".join(document for document in documents if document in chosen))
    return str(path)


@pytest.fixture(scope="session")
def searched() -> Any:
    """What a search finds of a tiny model, without a folder; each is run once."""

    @functools.cache
    def searched(search: Search[Any], name: str = "gpt2", **model: Any) -> Any:
        return search(tiny(name, **model))

    return searched
