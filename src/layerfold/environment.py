"""Versions, processor and network of this machine."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
import socket
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from urllib.parse import urlsplit

import torch

from layerfold.errors import InputError, one_of
from layerfold.files import Json

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What weights are saved in, and computed with."""


def environment() -> dict[str, Json]:
    """Versions, threads and processor of this process."""
    return {
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "processor": _processor(),
        "platform": platform.platform(),
        "device": "cpu",
    }


DEVICE_VARIABLE, DTYPE_VARIABLE, OFFLOAD_VARIABLE = "LAYERFOLD_DEVICE", "LAYERFOLD_DTYPE", "LAYERFOLD_OFFLOAD"
DEVICES = "auto, cpu, cuda, cuda:N, mps"
VARIABLES = {"device": DEVICE_VARIABLE, "dtype": DTYPE_VARIABLE, "offload": OFFLOAD_VARIABLE}
AUTO = "auto"
OFFLOADS = (AUTO, "never", "always")
_PLACED: set[str] = set()
"""Variables that a `placed` has set."""


@contextlib.contextmanager
def placed(device: str | None, dtype: str | None, offload: str | None = None) -> Iterator[None]:
    """Set the variables ``LAYERFOLD_...`` of `VARIABLES` meanwhile; None leaves one as it is.

    Inside another `placed`, what that one set stays: an option of a command comes before its recipe.

    Raises:
        InputError: see `device_of`, `dtype_of` and `offload_of`.
    """
    wanted = {DEVICE_VARIABLE: device, DTYPE_VARIABLE: dtype, OFFLOAD_VARIABLE: offload}
    given = {name: value for name, value in wanted.items() if value is not None and name not in _PLACED}
    dtype_of(given.get(DTYPE_VARIABLE), device_of(given.get(DEVICE_VARIABLE)), torch.float32)
    offload_of(given.get(OFFLOAD_VARIABLE))
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    _PLACED.update(given)
    try:
        yield
    finally:
        _PLACED.difference_update(given)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def device_of(wanted: str | None = None) -> torch.device:
    """Return a device to compute on.

    Args:
        wanted: ``cpu``, ``cuda``, ``cuda:N`` or ``mps``; ``auto`` takes a GPU if there is one, else the processor. None
            takes what the variable ``LAYERFOLD_DEVICE`` says, and ``auto`` where it says nothing.

    Raises:
        InputError: no such device, or none here.
    """
    name = (os.environ.get(DEVICE_VARIABLE) or AUTO if wanted is None else wanted).strip().lower()
    match = re.fullmatch(r"auto|cpu|mps(?::0)?|cuda(:\d{1,3})?", name)
    if not match:
        raise InputError(f"device {one_of(name, DEVICES.split(', '))}")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == AUTO:
        return torch.device("cuda", 0) if gpus else torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if name.startswith("mps") and not torch.backends.mps.is_available():
        raise InputError("device 'mps', and torch finds no Apple GPU; accepted: auto, cpu")
    if name.startswith("cuda"):
        index = int((match[1] or ":0")[1:])
        if index >= gpus:
            there = f"{gpus} (cuda:0 ... cuda:{gpus - 1})" if gpus else "none"
            raise InputError(f"device {name!r}, and of such GPUs torch finds {there}; accepted: {DEVICES}")
        return torch.device("cuda", index)
    return torch.device(name)


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a GPU the current one: libraries that are not told which take that."""
    there = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.device(device) if there else contextlib.nullcontext()


def device_name(device: torch.device) -> str:
    """Return what a device is called, as ``cpu`` or ``NVIDIA H200``."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    return device.type


def dtype_of(wanted: str | None, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in.

    Args:
        wanted: ``float32``, ``bfloat16`` or ``float16``; ``auto`` takes float32 on the processor, and what the
            checkpoint holds elsewhere. None takes what the variable ``LAYERFOLD_DTYPE`` says, and ``auto`` where it
            says nothing.
        stored: what the checkpoint holds.

    Raises:
        InputError: no such dtype, or one that the device lacks.
    """
    name = (os.environ.get(DTYPE_VARIABLE) or AUTO if wanted is None else wanted).strip().lower()
    if name != AUTO and name not in DTYPES:
        raise InputError(f"dtype {one_of(name, [AUTO, *DTYPES])}")
    found = DTYPES[name] if name != AUTO else torch.float32 if device.type == "cpu" else stored
    if (
        found == torch.bfloat16
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        if name == AUTO:
            return torch.float32
        raise InputError(f"dtype 'bfloat16', which {device_name(device)} cannot compute in; accepted: float32, float16")
    return found


def offload_of(wanted: str | None = None) -> str:
    """Return whether weights wait in files: ``never``, ``always``, or ``auto``, only where memory is too small.

    Args:
        wanted: None takes what the variable ``LAYERFOLD_OFFLOAD`` says, and ``auto`` where it says nothing.

    Raises:
        InputError: something else.
    """
    name = (os.environ.get(OFFLOAD_VARIABLE) or AUTO if wanted is None else wanted).strip().lower()
    if name not in OFFLOADS:
        raise InputError(f"offload {one_of(name, OFFLOADS)}")
    return name


def versions() -> dict[str, str]:
    """Versions of the packages that figures depend on."""
    return dict(_versions())


@functools.cache
def _versions() -> dict[str, str]:
    known = {"python": platform.python_version()}
    for name in ("layerfold", "torch", "transformers", "accelerate", "safetensors", "tokenizers", "scipy"):
        with contextlib.suppress(PackageNotFoundError):
            known[name] = version(name)
    return known


@functools.cache
def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


_TIMEOUT_SECONDS = 5.0


@functools.cache
def hub_reachable() -> bool:
    """Whether a connection to the Hub opens; one attempt of at most 5 seconds, whose result is kept.

    The client libraries retry for half a minute and print a line for each attempt. A user behind a proxy counts as
    online, since a direct connection proves nothing there.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}:
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        with socket.create_connection((endpoint.hostname or "", port), timeout=_TIMEOUT_SECONDS):
            return True
    except OSError:
        return False
