"""Checkpoints that several modules look at, each written once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from kinds import Saved, made


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Where a kind of model lies, of a family and in a form; to be looked at only."""
    folder, known = tmp_path_factory.mktemp("saved"), dict[tuple[str, str, str], Path]()

    def find(kind: str, family: str, form: str) -> Path:
        key = (kind, family, form)
        if key not in known:
            known[key] = folder / str(len(known))
            made(kind, family).save(known[key], format=form)  # type: ignore[arg-type]
        return known[key]

    return find


@pytest.fixture
def copied(saved: Saved, tmp_path: Path) -> Saved:
    """The same in a folder that a test may damage."""

    def copy(kind: str, family: str, form: str) -> Path:
        return Path(shutil.copytree(saved(kind, family, form), tmp_path / "saved"))

    return copy
