"""`layerfold compress --repair`, as typed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import BLOCKS

from layerfold.checkpoint.load import load

pytestmark = pytest.mark.usefixtures("offline")


@pytest.mark.parametrize(
    ("words", "blocks"),
    [(["drop", "--blocks", 1], 3), (["collapse", "--n", 2], 2), (["share", "--window", "1:2", "--rank", 2], 4)],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
@pytest.mark.parametrize("level", ["refit", "refit+attention"])
def test_the_command_repairs_and_says_what_came_of_it(
    layerfold: Any, model: Path, study_corpus: str, tmp_path: Path, words: list[object], blocks: int, level: str
) -> None:
    out = tmp_path / "out"
    text = ["--corpus", study_corpus, "--repair", level, "--repair-tokens", 384]
    done = layerfold("compress", *words, *text, "--model", model, "--output-dir", out)
    assert (done.code, done.err) == (0, "")
    told = [line for line in done.out.splitlines() if "of its target" in line]
    assert [line.split(":")[0] for line in told] == [f"block {index:>2}" for index in range(blocks)]
    step = load(out).provenance.steps[-1]
    assert step["method"]["level"] == level
    first = step["notes"]["repaired"][0]
    assert f"misses {100 * first['error']:.2f}% of its target -> {100 * first['repaired']:.2f}%" in told[0]


def test_the_command_rescales(layerfold: Any, model: Path, study_corpus: str, tmp_path: Path) -> None:
    words = ["merge", "--n", 2, "--corpus", study_corpus, "--repair", "rescale", "--repair-tokens", 512]
    done = layerfold("compress", *words, "--model", model, "--output-dir", tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    told = [line for line in done.out.splitlines() if "deviations were" in line]
    assert len(told) == BLOCKS


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--repair", "refit", "--repair-tokens", 1], "limit of 1 tokens; accepted: 2 or more"),
        (["--repair", "refit", "--repair-tokens", 20], "calibration text of 1 window; accepted: 2 or more"),
        (["--repair", "refti"], "'refti'"),
    ],
)
def test_the_command_says_what_is_wrong(
    layerfold: Any, model: Path, study_corpus: str, tmp_path: Path, words: list[object], said: str
) -> None:
    out = tmp_path / "out"
    done = layerfold(
        "compress", "drop", "--blocks", 1, "--corpus", study_corpus, *words, "--model", model, "--output-dir", out
    )
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err
    assert not out.exists()


def test_a_repair_that_is_killed_leaves_nothing(model: Path, study_corpus: str, tmp_path: Path) -> None:
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    scratch.mkdir()
    program = (
        "import os, sys, layerfold.cli, layerfold.maths.ridge as found\n"
        "import layerfold.repair.refit as repairing\n"
        "def stop(*args, **settings):\n"
        f"    os.kill(os.getpid(), {int(signal.SIGKILL)})\n"
        "repairing.ridge_fit = stop\n"
        "layerfold.cli.main()\n"
    )
    words = ["compress", "drop", "--blocks", "1", "--repair", "refit", "--repair-tokens", "512"]
    command = [sys.executable, "-c", program, *words, "--corpus", study_corpus]
    command += ["--model", str(model), "--output-dir", str(out)]
    done = subprocess.run(command, env={**os.environ, "TMPDIR": str(scratch)}, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not list(scratch.iterdir())
    assert not out.exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"model", "scratch", "text"}
