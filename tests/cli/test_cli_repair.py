"""`layerfold compress --repair`, as typed."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from tiny import BLOCKS

from layerfold.checkpoint.load import load

pytestmark = pytest.mark.usefixtures("offline")


@pytest.mark.parametrize(
    ("typed", "blocks"),
    [("drop --blocks 1", 3), ("collapse --n 2", 2), ("share --window 1:2 --rank 2", 4)],
    ids=["drop", "collapse", "share"],
)
@pytest.mark.parametrize("level", ["refit", "refit+attention"])
def test_the_command_repairs_and_says_what_came_of_it(
    compress: Any, tmp_path: Path, typed: str, blocks: int, level: str
) -> None:
    done = compress(f"{typed} --repair {level} --repair-tokens 384")
    assert done.err == ""
    told = [line for line in done.out.splitlines() if "of its target" in line]
    assert [line.split(":")[0] for line in told] == [f"block {index:>2}" for index in range(blocks)]
    step = load(tmp_path / "out").provenance.steps[-1]
    assert step["method"]["level"] == level
    first = step["notes"]["repaired"][0]
    assert f"misses {100 * first['error']:.2f}% of its target -> {100 * first['repaired']:.2f}%" in told[0]


def test_the_command_rescales(compress: Any) -> None:
    done = compress("merge --n 2 --repair rescale --repair-tokens 512")
    assert done.err == ""
    assert len([line for line in done.out.splitlines() if "deviations were" in line]) == BLOCKS


def test_a_repair_that_is_killed_leaves_nothing(
    compress: Any, killed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    killed(lambda: compress("drop --blocks 1 --repair refit --repair-tokens 512"), "layerfold.repair.refit.ridge_fit")
    assert not list(scratch.iterdir())
    assert {path.name for path in tmp_path.iterdir()} <= {"model", "scratch", "text"}
