"""Python code in processes of their own that start at once.

They are forked from a process that has imported the heavy libraries that transformers imports, and neither transformers
nor layerfold: a process that starts from nothing takes many seconds to import these.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.process import BaseProcess
from pathlib import Path

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.tensor", "scipy.optimize", "tokenizers"]
)


def _run(code: str, said: Path, folder: Path, environment: dict[str, str]) -> None:
    """Run code in the new process, whose output goes to a file."""
    os.chdir(folder)
    os.environ.update(environment)
    with said.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    import torch

    torch.set_num_threads(1)  # as in the tests: more of them add up in another order
    exec(compile(code, "code of a test", "exec"), {"__name__": "__main__"})


def start(code: str, said: Path, folder: Path, **environment: str) -> BaseProcess:
    """Begin to run code in a folder; its output goes to a file."""
    process = _FORKS.Process(target=_run, args=(code, said, folder, environment), daemon=True)
    process.start()
    return process


def finish(process: BaseProcess, seconds: float = 300) -> int | None:
    """Wait for a process, and kill it if it hangs; return its exit code."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode
