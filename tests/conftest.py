"""Fixtures that several rooms of the house are tested with."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any library that reads it is imported: no test may reach for the network

from pathlib import Path

import pytest
import torch
from tiny import FAMILY_NAMES, Write, prose

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


@pytest.fixture(params=FAMILY_NAMES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file below the test's folder and return its path."""

    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture
def corpus_folder(write: Write) -> str:
    """A folder whose test split is six documents of generated text."""
    return str(write("corpus/test.txt", "\n\n".join(prose(30, seed) for seed in range(6))).parent)


@pytest.fixture
def study_corpus(write: Write) -> str:
    """A file with documents enough for all four splits."""
    return str(write("text/study.txt", "\n\n".join(prose(30, seed) for seed in range(60))))
