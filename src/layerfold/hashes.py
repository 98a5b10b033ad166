"""Hashes of files, and what is said where one is not as recorded."""

from __future__ import annotations

import hashlib
from pathlib import Path

from layerfold.errors import ModelError


def hash_file(path: Path, more: str = "") -> str:
    """SHA-256 of a file's bytes, and of more text after them."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(more.encode())
    return digest.hexdigest()


def check_hash(found: str, recorded: object, path: Path) -> None:
    """Raise ModelError where a file's hash is not the one recorded."""
    if found != recorded:
        raise ModelError(f"{str(path)!r} is damaged: SHA-256 {found[:12]}..., recorded {str(recorded)[:12]}...")
