"""The worked examples of ARCHITECTURE.md run as they stand."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from layerfold.evaluators import EVALUATORS
from layerfold.methods import METHODS
from layerfold.model.families import FAMILIES
from layerfold.recovery import RECOVERIES

PAGE = (Path(__file__).parents[1] / "ARCHITECTURE.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^```python (\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Take out of the registries what an example adds, and give it a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with patch.dict(METHODS), patch.dict(EVALUATORS), patch.dict(FAMILIES), patch.dict(RECOVERIES):
        yield


def test_the_page_has_these_examples() -> None:
    assert [*BLOCKS] == ["method", "evaluator", "study", "family", "recovery"]


@pytest.mark.parametrize(
    "names", [["method", "evaluator", "study"], ["family"], ["recovery"]], ids=lambda names: names[-1]
)
def test_an_example_runs(names: list[str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / f"example_{name}.py").write_text(BLOCKS[name], encoding="utf-8")
        importlib.import_module(f"example_{name}")
