"""Runs experiments: what is missing or out of date, one after another, each in a process of its own."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from figures.experiments import COSTS, ROOT, RUNS, SMOLLM2, SMOLLM2_SHA256, Experiment
from layerfold.errors import InputError, LayerfoldError
from layerfold.files import hash_file, write_text

LOG = RUNS / "log.txt"
_SMOLLM2_AT = "SMOLLM2"
"""Environment variable with the path of SmolLM2's file."""
_POLL = 0.5


@dataclass
class Running:
    """An experiment in progress.

    Attributes:
        key: of its figures, as its recipe was when it began.
        output: what its command writes.
    """

    experiment: Experiment
    device: str
    key: str
    output: Path
    process: subprocess.Popen[bytes]
    begun: float

    @property
    def log(self) -> Path:
        """What it says."""
        return RUNS / f"{self.experiment.name}.log"


def run(experiments: Sequence[Experiment], jobs: int, device: str, say: Callable[[str], None]) -> list[str]:
    """Run experiments and write their results; those that are timed run alone, after the others.

    A killed run goes on where it stopped: what is written stays, and an experiment resumes in its own folder. An
    experiment that fails stops no other.

    Args:
        jobs: processes at a time, one thread each.
        device: where models compute.

    Returns:
        The names of those that failed.

    Raises:
        InputError: another run is in progress.
    """
    with alone() as lock:
        failed: list[str] = []
        for timed in (False, True):
            waiting = [each for each in experiments if each.timed is timed]
            failed += _run_all(waiting, 1 if timed else jobs, device, lock, say)
        return failed


def _run_all(
    waiting: Sequence[Experiment], jobs: int, device: str, lock: IO[str], say: Callable[[str], None]
) -> list[str]:
    queue, running, failed = list(waiting), list[Running](), list[str]()
    try:
        while queue or running:
            while queue and len(running) < jobs:
                experiment = queue.pop(0)
                left = sum(each.experiment.minutes for each in running) + sum(each.minutes for each in queue)
                say(f"{experiment.name} begins; about {_hours(left + experiment.minutes)} of one thread left")
                try:
                    running.append(_start(experiment, device, lock))
                except (LayerfoldError, OSError) as error:
                    failed.append(experiment.name)
                    say(f"{experiment.name} failed: {error}")
            time.sleep(_POLL)
            for each in list(running):
                before = _processor_seconds()
                if each.process.poll() is None:
                    continue
                running.remove(each)
                error_said = _finish(each, _processor_seconds() - before)
                name, taken = each.experiment.name, _hours((time.monotonic() - each.begun) / 60)
                said = f"is written: {each.experiment.result.relative_to(ROOT)} ({taken})"
                say(f"{name} failed after {taken}: {error_said}" if error_said else f"{name} {said}")
                failed += [name] if error_said else []
    finally:
        for each in running:
            each.process.terminate()
        for each in running:
            each.process.wait()
    return failed


def _start(experiment: Experiment, device: str, lock: IO[str]) -> Running:
    device = device if experiment.device == "any" else experiment.device
    key = experiment.key(device)
    at = output(experiment, key)
    words = command(experiment, at)
    variables = {name: value for name, value in os.environ.items() if not name.startswith("LAYERFOLD_")}
    variables |= {"OMP_NUM_THREADS": "1", "LAYERFOLD_DEVICE": device, "LAYERFOLD_DTYPE": "float32"}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    _note_start(experiment)
    with (RUNS / f"{experiment.name}.log").open("ab") as log:
        # The lock goes along: while what a killed run began is still at work, no other run begins.
        process = subprocess.Popen(
            words, cwd=ROOT, env=variables, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            pass_fds=[lock.fileno()],
        )  # fmt: skip
    return Running(experiment, device, key, at, process, time.monotonic())


def command(experiment: Experiment, at: Path) -> list[str]:
    """Return the command line of an experiment, with the place of its output."""
    first, *words = shlex.split(experiment.command)
    words = [os.environ.get(_SMOLLM2_AT, word) if word == SMOLLM2 else word for word in words]
    if first == "python":
        # What the comparison keeps on the way knows less than the key does.
        kept = ["--folder", str(at.with_suffix(""))] if experiment.name.startswith("quality") else []
        return [sys.executable, *words, *kept, "--json", str(at)]
    return [sys.executable, "-m", "layerfold.cli", *words, "--output-dir", str(at)]


def output(experiment: Experiment, key: str) -> Path:
    """Return the folder that a command of layerfold writes, or the file that a benchmark writes.

    A study names its records by all that determines them, so that its folder serves another recipe too. The others get
    a folder for each key.
    """
    if experiment.recipe() is not None:
        return RUNS / experiment.name
    return RUNS / f"{experiment.name}-{key[:8]}{'.json' * experiment.command.startswith('python')}"


def missing(experiment: Experiment) -> str:
    """Say what an experiment needs that is not there; nothing where nothing is missing."""
    if not experiment.needs:
        return ""
    path = os.environ.get(_SMOLLM2_AT, "")
    if not Path(path).is_file():
        return f"needs {experiment.needs}; name it in the variable {_SMOLLM2_AT}"
    if hash_file(Path(path)) != SMOLLM2_SHA256:
        return f"needs {experiment.needs}; the file {path!r} has other contents"
    return ""


def _processor_seconds() -> float:
    """Return the processor time of all processes that were begun here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _finish(running: Running, processor_seconds: float) -> str:
    """Write the result of an ended experiment; return what went wrong, if anything did."""
    experiment, code = running.experiment, running.process.returncode
    see = f"(see {running.log.relative_to(ROOT)})"
    if code < 0:
        return f"killed by signal {-code} {see}"
    if code:
        lines = running.log.read_text(encoding="utf-8", errors="replace").split("\n")
        return f"{next((line for line in reversed(lines) if line.strip()), '')[:300]} {see}"
    try:
        found = experiment.read(running.output)
    except (OSError, ValueError, KeyError, TypeError, LayerfoldError) as error:
        return f"its output cannot be read: {type(error).__name__}: {error} {see}"
    head = {"experiment": experiment.name, "command": experiment.command, "device": running.device, "key": running.key}
    write_text(experiment.result, json.dumps(head | found, indent=1) + "\n")
    _note_cost(running, processor_seconds)
    return ""


# What each experiment took in its last run, and in how many runs it was made, where it was killed and went on.


def _note_start(experiment: Experiment) -> None:
    file = _started(experiment)
    begun = json.loads(file.read_text()) if file.is_file() else []
    write_text(file, json.dumps([*begun, time.time()]))


def _note_cost(running: Running, processor_seconds: float) -> None:
    costs = json.loads(COSTS.read_text()) if COSTS.is_file() else {}
    begun = json.loads(_started(running.experiment).read_text())
    minutes = (time.monotonic() - running.begun) / 60
    costs[running.experiment.name] = {
        "minutes": round(minutes, 1),
        "processor_minutes": round(processor_seconds / 60, 1),
        "runs": len(begun),
    }
    write_text(COSTS, json.dumps(dict(sorted(costs.items())), indent=1) + "\n")
    _started(running.experiment).unlink()


def _started(experiment: Experiment) -> Path:
    return RUNS / f"{experiment.name}.started.json"


@contextlib.contextmanager
def alone() -> Iterator[IO[str]]:
    """Hold the lock that one run has at a time.

    Raises:
        InputError: another run has it, or what a killed run began.
    """
    RUNS.mkdir(parents=True, exist_ok=True)
    with (RUNS / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"figures are being made already: see {LOG.relative_to(ROOT)}") from error
        yield lock


def in_background(words: Sequence[str]) -> int:
    """Start this program again in a session of its own, its lines in a log; return the process."""
    with alone():
        pass  # a run that is in progress is said now, not in the log
    with LOG.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "figures", *words], cwd=ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
    return process.pid


def _hours(minutes: float) -> str:
    return f"{int(minutes) // 60}:{int(minutes) % 60:02} h"
