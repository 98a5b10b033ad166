"""Figures, checkpoints, documents, refusals and help are those that are kept, and a kept run resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from characterise import HERE, characterise, compare, differences, run

pytestmark = pytest.mark.usefixtures("offline")


def test_what_the_product_does_is_what_is_kept() -> None:
    assert compare("quick", characterise("quick")) == []


@pytest.mark.parametrize(
    ("kept", "found", "exact", "said"),
    [
        ({"a": 1.0}, {"a": 1.0 + 1e-12}, True, ["/a: 1.0 -> 1.000000000001"]),
        ({"a": 1.0}, {"a": 1.0 + 1e-12}, False, []),
        ({"a": 1.0}, {"a": 1.001}, False, ["/a: 1.0 -> 1.001"]),
        ({"a": [1]}, {"a": [1, 2]}, False, ["/a: [1] -> [1, 2]"]),
        ({"a": 1}, {"b": 1}, False, ["/a: gone", "/b: new"]),
        ({"a": 1}, {"a": 1.0}, True, ["/a: 1 -> 1.0"]),
        ({"a": "loss 1.25"}, {"a": "loss 1.26"}, False, []),
        ({"a": "loss 1.25"}, {"a": "lost 1.25"}, False, ["/a: 'loss 1.25' -> 'lost 1.25'"]),
    ],
)
def test_differences_are_found(kept: object, found: object, exact: bool, said: list[str]) -> None:
    assert list(differences(kept, found, exact)) == said


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_that_an_earlier_version_made_is_not_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = HERE / "run"
    shutil.copytree(kept, tmp_path / "run")
    shutil.copy(HERE / "run.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    code, out, err = run("study run.yaml --output-dir run --json")
    assert code == 0, err
    before, after = contents(kept / "records"), contents(tmp_path / "run" / "records")
    assert after == before
    measured = {(each["label"], each["evaluator"], each["score"]["value"]) for each in map(json.loads, before.values())}
    shown = {
        (row["label"], name, score["value"])
        for row in json.loads(out)["variants"]
        for name, score in row["scores"].items()
    }
    assert shown <= measured
    assert len(shown) == 30
