"""Fixtures that several rooms of the house are tested with."""

from __future__ import annotations

import gc
import itertools
import os
import pkgutil
import signal
import warnings
from collections.abc import Callable

os.environ["LAYERFOLD_DEVICE"] = "cpu"  # tests/gpu names its devices
os.environ.pop("LAYERFOLD_DTYPE", None)
os.environ["HF_HUB_OFFLINE"] = "1"  # before any library that reads it is imported: no test may reach for the network

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tiny import Write

# What imports torch is imported where it is needed: a process that hands tests out to others does without.


def pytest_collection_finish() -> None:
    """Set up a process that is about to run tests."""
    import torch

    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


@pytest.fixture(scope="module", autouse=True)
def _quick_collection() -> None:
    """Keep what is there out of the collections of garbage that trainings and comparisons begin with: most of them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=["gpt2", "llama", "qwen2", "qwen3"])
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file below the test's folder and return its path."""

    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder whose test split is six documents of generated text; the same in all tests, which leave it alone."""
    from tiny import prose

    folder = tmp_path_factory.mktemp("corpus")
    (folder / "test.txt").write_text("\n\n".join(prose(30, seed) for seed in range(6)))
    return str(folder)


@pytest.fixture(scope="session")
def study_corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with documents enough for all four splits: 6 of test, 6 of validation, 3 of calibration, 45 of train.

    The same in all tests, which leave it alone.
    """
    from tiny import prose

    from layerfold.text.sources import disjoint

    documents = [prose(30, seed) for seed in range(120)]
    kept, _ = disjoint({"all": documents}, str)
    counts = {"test": 6, "validation": 6, "calibration": 3, "train": 45}
    chosen = {document for split, count in counts.items() for document in kept[split][:count]}
    path = tmp_path_factory.mktemp("text") / "study.txt"
    path.write_text("\n\n".join(document for document in documents if document in chosen))
    return str(path)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Say that there is no Hub."""
    for module in ("checkpoint.load", "text.sources", "cli.doctor"):
        monkeypatch.setattr(f"layerfold.{module}.hub_reachable", lambda: False)


class Outcome:
    """What a command did."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def unweighed(self) -> list[str]:
        """The lines that it printed, less that of what the weights take on disk, which has tests of its own."""
        return [line for line in self.out.splitlines() if not line.startswith("on disk: ")]


@pytest.fixture
def layerfold(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Run a command in this process and return its exit code and what it printed."""
    from layerfold import cli

    def run(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["layerfold", *map(str, words)])
        capfd.readouterr()
        code: int | str | None = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        captured = capfd.readouterr()
        return Outcome(int(code or 0), captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of four blocks, written once."""
    from tiny import tiny

    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny("gpt2").save(folder)
    return folder


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint of four blocks."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def steps_taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of every step that any training begins, those of trials of a learning rate too."""
    from tiny import count_steps

    return count_steps(monkeypatch)


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run something in a copy of this process, which is killed as a function is called for the n-th time."""

    def killed(run: Callable[[], object], name: str, number: int = 1, of: str = "") -> None:
        """`name` is the function's; with `of`, only calls with this in their arguments count."""
        original, calls = pkgutil.resolve_name(name), itertools.count(1)

        def dying(*arguments: Any, **options: Any) -> Any:
            if of in str(arguments) and next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # a copy has none of this process's other threads
            child = os.fork()
        if not child:
            signal.alarm(120)  # seconds, after which it is killed by another signal
            monkeypatch.setattr(name, dying)
            try:
                run()
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

    return killed
