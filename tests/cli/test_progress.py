"""What commands say while they work: bars in a terminal, elsewhere a line now and then; results as they come."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
import rich.console

from layerfold.cli import console
from layerfold.cli.console import drawn
from layerfold.progress import Step


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that have passed, which a test sets."""
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_there_is_one_line_in_ten_seconds_at_most(clock: list[float], capfd: Any) -> None:
    steps = [Step("first", 1.0), Step("second", 3.0)]
    with drawn() as progress:
        for step in progress.track(steps, "study", 4.0):
            for _ in progress.track(range(40), f"windows of {step.description}"):
                clock[0] += 1.0
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 7, "of eighty seconds; what takes less than ten has none"
    assert lines[0] == "study: first; windows of first (0%, 0:10)"
    assert lines[4] == "study: second; windows of second (25%, 0:50, about 2:30 left)"


def test_the_estimate_is_of_the_work_that_goes_on(clock: list[float], capfd: Any) -> None:
    with drawn() as progress:
        with progress.doing("loading"):
            clock[0] += 3600.0
        for _ in progress.track(range(4), "study, seed 1"):
            clock[0] += 10.0
        with progress.doing("reading"):
            for _ in progress.track(range(2), "windows"):
                clock[0] += 10.0
    lines = capfd.readouterr().err.splitlines()
    assert lines[:2] == ["study, seed 1 (0%, 0:00)", "study, seed 1 (25%, 0:10, about 0:30 left)"]
    assert lines[-1] == "reading; windows (0:10)"


def test_a_result_is_shown_at_once_and_a_note_at_the_end(clock: list[float], capfd: Any) -> None:
    with drawn() as progress:
        for number in progress.track([1, 2], "study"):
            progress.result(f"row {number}")
            progress.note("said once")
        assert [line for line in capfd.readouterr().err.splitlines() if line.startswith("row")] == ["row 1", "row 2"]
    assert capfd.readouterr().out.splitlines() == ["said once"] * 2


def test_in_a_terminal_there_are_bars_and_no_lines(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    written = io.StringIO()
    original = rich.console.Console
    monkeypatch.setattr(rich.console, "Console", lambda **_: original(file=written, force_terminal=True, width=100))
    with drawn() as progress:
        for _ in progress.track([Step("first", 1.0)], "study", 1.0):
            progress.result("row 1")
    assert "row 1" in written.getvalue()
    assert "(0%" not in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written.getvalue())


@pytest.mark.parametrize(("seconds", "said"), [(0, "0:00"), (65.4, "1:05"), (3600 + 125, "1:02:05")])
def test_a_duration_is_written_as_on_a_clock(seconds: float, said: str) -> None:
    assert console._clock(seconds) == said


def test_a_study_shows_each_row_as_soon_as_it_is_scored(
    layerfold: Any, model: Path, study_corpus: str, tmp_path: Path, write: Any
) -> None:
    recipe = write(
        "recipe.yaml",
        f"base: {model}\nvariants: [{{label: shorter, drop: {{blocks: '1'}}}}]\n"
        f"evaluate: [size, {{perplexity: {{corpus: {study_corpus}}}}}]\ncalibration: {{corpus: {study_corpus}}}\n",
    )
    outcome = layerfold("study", recipe, "--output-dir", tmp_path / "r")
    assert outcome.code == 0, outcome.err
    rows = [
        line for line in outcome.err.splitlines() if re.match(r"\w+: perplexity [\d.,]+ \[[\d.,]+, [\d.,]+\]$", line)
    ]
    assert [row.partition(":")[0] for row in rows] == ["base", "shorter"]
    again = layerfold("study", recipe, "--output-dir", tmp_path / "r")
    assert "perplexity" not in again.err, "nothing was measured"
