"""What the benchmarks share: the GPT-2 shape, fresh processes, peaks of memory, and how figures are written."""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch

from layerfold.checkpoint.load import load
from layerfold.cli.doctor import matrix_product_rate
from layerfold.environment import environment
from layerfold.files import write_text
from layerfold.model.decoder import Decoder
from layerfold.text.windows import TokenWindows

T = TypeVar("T")
Figures = dict[str, Any]

CONTEXT = 1024
VOCABULARY = 50_257
MATRIX_SIZES = (1024, 2048, 4096)


def arguments(description: str | None) -> argparse.Namespace:
    """Parse what every benchmark accepts: ``--quick`` and ``--json FILE``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer tokens and rounds: a look, not a figure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and the environment here")
    return parser.parse_args()


def report(name: str, figures: Figures, path: Path | None) -> None:
    """Print figures as a table and write them with the environment they were taken in."""
    width = max(map(len, figures))
    for key, value in figures.items():
        print(f"{key:<{width}}  {f'{value:,.3f}' if isinstance(value, float) else f'{value:,}'}")
    if path is not None:
        document = {"benchmark": name, "figures": figures, "environment": environment()}
        write_text(path, json.dumps(document, indent=1) + "\n")


@contextlib.contextmanager
def gpt2_folder() -> Iterator[Path]:
    """Yield a folder with a randomly initialised checkpoint of the GPT-2 shape, built in another process."""
    with tempfile.TemporaryDirectory(prefix="layerfold-benchmark-") as name:
        in_fresh_process(_write_gpt2, Path(name))
        yield Path(name)


def _write_gpt2(folder: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)  # the defaults are GPT-2's: 12 x 768, 50,257, 1,024


def load_touched(folder: Path) -> Decoder:
    """Load a checkpoint and read every weight, so that all of them are resident."""
    decoder = load(folder).decoder
    for parameter in decoder.model.parameters():
        parameter.data = parameter.data.clone()  # out of the mapped file, into memory of this process
    decoder.model.tie_weights()
    return decoder


def random_windows(count: int, context: int = CONTEXT) -> TokenWindows:
    """Windows of random token ids, all scored but the first of each."""
    generator = torch.Generator().manual_seed(0)
    return TokenWindows(
        input_ids=torch.randint(0, VOCABULARY, (count, context), generator=generator),
        lengths=torch.full((count,), context),
        first_scored=torch.ones(count, dtype=torch.int64),
        document_starts=torch.zeros(1, dtype=torch.int64),
        bytes=0,
        context=context,
        stride=context,
        corpus="random",
        split="test",
        corpus_sha256="",
    )


def in_fresh_process(function: Callable[..., T], *args: Any) -> T:
    """Call a function of a module in a new interpreter, so that nothing run before counts in its memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *args).result()


def peak_of(work: Callable[[], object]) -> int:
    """Bytes by which the resident set rises at most while `work` runs, above where it stands now."""
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
    before = status_bytes("VmRSS")
    work()
    return status_bytes("VmHWM") - before


def status_bytes(field: str, process: int | str = "self") -> int:
    """Read a size from ``/proc/PROCESS/status``; 0 once the process has ended."""
    with contextlib.suppress(OSError):
        match = re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
        if match:
            return int(match[1]) * 1024
    return 0


def seconds(work: Callable[[], object]) -> float:
    """Time one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def best_matrix_rate() -> float:
    """Best rate of float32 matrix products over a few large sizes, in operations a second."""
    return max(matrix_product_rate(torch.float32, size, repeats=3) for size in MATRIX_SIZES)


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Median of each figure over the rounds."""
    return {key: median(one[key] for one in rounds) for key in rounds[0]}
