"""Commands on a checkpoint of four blocks and little text; what each must come to is checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FEW = {"context": 16, "batch_size": 4, "validation_tokens": 64}
"""Settings of a short recovery."""

Command = Callable[..., Any]


@pytest.fixture
def compress(layerfold: Any, model: Path, study_corpus: str, tmp_path: Path) -> Command:
    """Compress the checkpoint, or another; words in one string are parted by spaces."""

    def compress(typed: str, *words: object, out: str = "out", of: Path = model, code: int = 0) -> Any:
        corpus = () if "--corpus" in words else ("--corpus", study_corpus)
        where = ("--model", of, "--output-dir", tmp_path / out)
        done = layerfold("compress", *typed.split(), *words, *corpus, *where)
        assert done.code == code, done.err
        return done

    return compress


@pytest.fixture
def recover(layerfold: Any, model: Path, study_corpus: str, tmp_path: Path) -> Command:
    """Train the checkpoint, or another, on four steps of text."""

    def recover(
        typed: str = "", *words: object, out: str = "out", of: Path = model, code: int = 0, **settings: Any
    ) -> Any:
        few = [word for setting in (FEW | settings).items() for word in ("--set", "=".join(map(str, setting)))]
        where = ("--corpus", study_corpus, "--output-dir", tmp_path / out)
        done = layerfold("recover", of, "--tokens", 256, *where, *few, *typed.split(), *words)
        assert done.code == code, done.err
        return done

    return recover


@pytest.fixture
def export(layerfold: Any, tmp_path: Path) -> Callable[..., Path]:
    """Write a checkpoint in another form; return its folder."""

    def export(folder: Path, form: str, out: str) -> Path:
        assert layerfold("export", folder, "--to", form, "--output-dir", tmp_path / out).code == 0
        return tmp_path / out

    return export
