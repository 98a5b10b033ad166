"""Versions, processor and network of this machine."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import socket
from importlib.metadata import PackageNotFoundError, version
from urllib.parse import urlsplit

import torch

from layerfold.files import Json


def environment() -> dict[str, Json]:
    """Versions, threads and processor of this process."""
    return {
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "processor": _processor(),
        "platform": platform.platform(),
        "device": "cpu",
    }


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
