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

from figures.experiments import COSTS, ROOT, RUNS, SMOLLM2, Experiment
from layerfold.errors import InputError
from layerfold.files import write_text

LOG = RUNS / "log.txt"
_SMOLLM2_AT = "SMOLLM2"
"""Environment variable with the path of SmolLM2's file."""
_POLL = 0.5


@dataclass
class Running:
    """An experiment in progress."""

    experiment: Experiment
    process: subprocess.Popen[bytes]
    log: Path
    begun: float


def run(experiments: Sequence[Experiment], jobs: int, device: str, say: Callable[[str], None]) -> list[str]:
    """Run experiments and write their results; those that are timed run alone, after the others.

    A killed run goes on where it stopped: what is written stays, and an experiment resumes in its own folder.

    Args:
        jobs: processes at a time, one thread each.
        device: where models compute.

    Returns:
        The names of those that failed.

    Raises:
        InputError: another run is in progress.
    """
    RUNS.mkdir(parents=True, exist_ok=True)
    with _alone() as lock:
        failed: list[str] = []
        for alone in (False, True):
            waiting = [each for each in experiments if each.timed is alone]
            failed += _run_all(waiting, 1 if alone else jobs, device, lock, say)
        return failed


def _run_all(
    waiting: Sequence[Experiment], jobs: int, device: str, lock: IO[str], say: Callable[[str], None]
) -> list[str]:
    queue, running, failed = list(waiting), list[Running](), list[str]()
    try:
        while queue or running:
            while queue and len(running) < jobs:
                running.append(_start(queue.pop(0), device, lock))
                left = sum(each.experiment.minutes for each in running) + sum(each.minutes for each in queue)
                say(f"{running[-1].experiment.name} begins; about {_hours(left)} of one thread left")
            time.sleep(_POLL)
            for each in list(running):
                before = _processor_seconds()
                if each.process.poll() is None:
                    continue
                running.remove(each)
                error = _finish(each, _processor_seconds() - before)
                taken = _hours((time.monotonic() - each.begun) / 60)
                say(f"{each.experiment.name} failed after {taken}: {error}" if error else _written(each, taken))
                failed += [each.experiment.name] if error else []
    finally:
        for each in running:
            each.process.terminate()
    return failed


def _start(experiment: Experiment, device: str, lock: IO[str]) -> Running:
    log = RUNS / f"{experiment.name}.log"
    _note_start(experiment)
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "LAYERFOLD_DEVICE": device,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    with log.open("ab") as output:
        # The lock goes along: while what a killed run began is still at work, no other run begins.
        process = subprocess.Popen(
            command(experiment), cwd=ROOT, env=variables, stdout=output, stderr=output, stdin=subprocess.DEVNULL,
            pass_fds=[lock.fileno()],
        )  # fmt: skip
    return Running(experiment, process, log, time.monotonic())


def command(experiment: Experiment) -> list[str]:
    """Return the command line of an experiment, with the place of its output."""
    first, *words = shlex.split(experiment.command)
    words = [os.environ.get(_SMOLLM2_AT, word) if word == SMOLLM2 else word for word in words]
    at = str(output(experiment))
    if first == "python":
        kept = ["--folder", str(RUNS / experiment.name)] if experiment.name.startswith("quality") else []
        return [sys.executable, *words, *kept, "--json", at]
    return [sys.executable, "-m", "layerfold.cli", *words, "--output-dir", at]


def output(experiment: Experiment) -> Path:
    """Return the folder that a command of layerfold writes, or the file that a benchmark writes.

    A study names its records by all that determines them, so that its folder serves another recipe too. The others get
    a folder for each key.
    """
    if experiment.recipe() is not None:
        return RUNS / experiment.name
    return RUNS / f"{experiment.name}-{experiment.key[:8]}{'.json' * experiment.command.startswith('python')}"


def missing(experiment: Experiment) -> str:
    """Say what an experiment needs that is not there; nothing where nothing is missing."""
    path = os.environ.get(_SMOLLM2_AT, "")
    if experiment.needs and not Path(path).is_file():
        return f"needs {experiment.needs}; name it in the variable {_SMOLLM2_AT}"
    return ""


def _processor_seconds() -> float:
    """Return the processor time of all processes that were begun here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _finish(running: Running, processor_seconds: float) -> str:
    """Write the result of an ended experiment; return what went wrong, if anything did."""
    experiment = running.experiment
    if running.process.returncode:
        lines = running.log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        return f"{last[:300]} (see {running.log.relative_to(ROOT)})"
    found = experiment.read(output(experiment))
    document = {"experiment": experiment.name, "command": experiment.command, "key": experiment.key, **found}
    write_text(experiment.result, json.dumps(document, indent=1, sort_keys=False) + "\n")
    _note_cost(running, processor_seconds)
    return ""


def _written(running: Running, taken: str) -> str:
    return f"{running.experiment.name} is written: {running.experiment.result.relative_to(ROOT)} ({taken})"


# What each experiment took: the sum over its runs, where it was killed and went on.


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
def _alone() -> Iterator[IO[str]]:
    """Hold the lock that one run has at a time."""
    with (RUNS / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"figures are being made already: see {LOG.relative_to(ROOT)}") from error
        yield lock


def in_background(words: Sequence[str]) -> int:
    """Start this program again in a session of its own, its lines in a log; return the process."""
    RUNS.mkdir(parents=True, exist_ok=True)
    with LOG.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "figures", *words], cwd=ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
    return process.pid


def _hours(minutes: float) -> str:
    return f"{int(minutes) // 60}:{int(minutes) % 60:02} h"
