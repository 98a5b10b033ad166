"""Real processes: one that is killed, and two that train together."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import runs

from layerfold import cli
from layerfold.hub import Model, load
from layerfold.recovery.run import Outcome

STEPS = 90
EVALUATIONS = 30


@pytest.fixture
def model(tmp_path: Path) -> Path:
    runs.small().save(tmp_path / "model")
    return tmp_path / "model"


def words(model: Path, corpus: str, out: Path, **settings: object) -> list[str]:
    """What is typed to fine-tune a model."""
    few = {"context": 16, "batch_size": 4, "validation_tokens": 64} | settings
    options = {"--method": "finetune", "--corpus": corpus, "--learning-rate": "1e-3", "--output-dir": str(out)}
    steps = int(str(few.pop("steps")))
    flat = [word for option in options.items() for word in option]
    return [
        *("recover", str(model), "--tokens", str(steps * runs.STEP), *flat),
        *(word for key, value in few.items() for word in ("--set", f"{key}={value}")),
    ]


def environment() -> dict[str, str]:
    """One thread a process, as in the tests: more of them add up in another order."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def notes(model: Model) -> dict[str, object]:
    found: dict[str, object] = model.provenance.steps[-1]["notes"]
    return found


def assert_equal(one: Model, two: tuple[Model, Outcome]) -> None:
    assert runs.drift(one, two[0]) < 1e-5
    for name in ("train", "validation"):
        assert np.allclose(notes(one)["curve"][name], two[1].curve[name], atol=1e-5)  # type: ignore[index]
    assert notes(one)["best_step"] == two[1].best_step
    assert notes(one)["steps"] == two[1].steps


def test_a_process_killed_anywhere_goes_on(model: Path, study_corpus: str, tmp_path: Path) -> None:
    out, training = tmp_path / "out", tmp_path / "out.training"
    typed = words(model, study_corpus, out, steps=STEPS, evaluations=EVALUATIONS)
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    wanted, pause = chance.randint(1, 10), chance.random() * 0.1
    process = subprocess.Popen(
        [sys.executable, "-m", "layerfold.cli", *typed],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )

    def reached() -> int:
        marked = [int(path.parent.name.rpartition("-")[2]) for path in training.glob("checkpoint-*/layerfold-*.json")]
        return max(marked, default=0)

    deadline = time.monotonic() + 120
    while reached() < 3 * wanted and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(pause)
    os.kill(process.pid, signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode == -signal.SIGKILL, said
    assert 3 <= reached() < STEPS, f"seed {seed}"
    assert not out.exists()
    cli.app(typed, standalone_mode=False)
    recovery = runs.finetune(study_corpus, steps=STEPS, evaluations=EVALUATIONS)
    straight = runs.train(load(model), recovery, tmp_path / "straight")
    print(f"seed {seed}")  # what pytest shows should this fail
    assert_equal(load(out), straight)
    assert not training.exists()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def launched(*words: str, timeout: int = 240) -> subprocess.CompletedProcess[str]:
    """Run in two processes.

    Not by `accelerate launch --cpu --num_processes 2`: without mpirun that starts one. torchrun starts two, and
    accelerate's variable says that they are to be on the processor.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launcher += ["--master-addr", "127.0.0.1", "--master-port", str(free_port()), *words]
    variables = environment() | {"ACCELERATE_USE_CPU": "true"}
    with subprocess.Popen(
        launcher, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(launcher, process.returncode, out, err)


def test_two_processes_train_as_one_does(model: Path, study_corpus: str, tmp_path: Path) -> None:
    """A step's windows are shared between them; three windows of validation text are not evenly."""
    # fails: `PartialState()`, asked before the Trainer's arguments are made, does not know of the other process where
    # both are on the processor. So each takes a whole batch, reads the text twice, and writes.
    out = tmp_path / "out"
    settings = {"evaluations": 3, "validation_tokens": 44, "accumulation": 2, "weight_decay": 0.1}
    done = launched("-m", "layerfold.cli", *words(model, study_corpus, out, steps=6, **settings))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("validation perplexity") == 1, "one process speaks"
    recovery = runs.finetune(study_corpus, steps=6, **settings)
    straight = runs.train(load(model), recovery, tmp_path / "straight")
    assert straight[1].best_step == 6
    assert_equal(load(out), straight)
    assert not (tmp_path / "out.training").exists()
