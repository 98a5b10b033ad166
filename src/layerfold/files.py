"""Files and folders that appear whole or not at all, and their hashes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from layerfold.errors import LayerfoldError, ModelError, OutputError, first_line

Json = Any
"""A value that json.dumps accepts."""

_OF_TORCH = ("PytorchStreamWriter", "inline_container", "iostream")
"""Signs in an error's text that torch could not write a file."""


def hash_json(value: Json) -> str:
    """SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn every library's errors for a path that cannot be written into one line.

    Raises:
        OutputError: the path cannot be written.
    """
    try:
        yield
    except LayerfoldError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch raises RuntimeError for a full disk.
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in _OF_TORCH):
            raise
        said = getattr(error, "strerror", None) or first_line(error)
        raise OutputError(f"cannot write {str(path)!r}: {said}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it after a block without an error.

    Raises:
        OutputError: the file cannot be written.
    """
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            _open_up(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_folder(directory: Path, *, overwrite: bool) -> None:
    """Raise, before long work, the OutputError of `writing_folder`.

    Even `overwrite` does not replace a file, a folder that contains the current one, or a folder with folders in it,
    which no checkpoint has.
    """
    if directory.exists() and not directory.is_dir():
        raise OutputError(f"the output {str(directory)!r} is a file; accepted: a folder that is empty or new")
    if directory.is_dir():
        output, held = f"the output folder {str(directory)!r}", sorted(directory.iterdir())
        if Path.cwd().resolve().is_relative_to(directory.resolve()):
            raise OutputError(f"{output} holds the current folder; it is not replaced")
        if held and not overwrite:
            raise OutputError(f"{output} is not empty; --overwrite replaces it whole")
        if folders := [path.name for path in held if path.is_dir()]:
            raise OutputError(f"{output} holds folders ({folders[0]!r}); it is not replaced")


def check_run_folder(directory: Path, marker: str, *, overwrite: bool) -> None:
    """Raise OutputError for a folder that holds something other than a run, which would be resumed.

    Args:
        marker: glob pattern of a file in every run's folder.
        overwrite: accept any folder; nothing in it is removed.
    """
    try:
        is_file = directory.exists() and not directory.is_dir()
        # Temporary files of a killed process do not count.
        held = directory.is_dir() and any(path.suffix != ".tmp" for path in directory.iterdir())
    except OSError as error:
        raise OutputError(f"the output folder {str(directory)[:60]!r}: {error.strerror or error}") from error
    if is_file:
        raise OutputError(f"the output {str(directory)!r} is a file; accepted: a folder that is empty, new or a run's")
    if held and not overwrite and not any(directory.glob(marker)):
        raise OutputError(
            f"the output folder {str(directory)!r} holds something other than such a run ({marker}); "
            "--overwrite writes into it"
        )


@contextlib.contextmanager
def writing_folder(directory: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary folder beside `directory` that replaces it after a block without an error."""
    check_folder(directory, overwrite=overwrite)
    directory = directory.resolve()
    with output_errors(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}.", suffix=".tmp"))
        try:
            yield temporary
            _open_up(temporary)
            if directory.exists():
                replaced = temporary.with_suffix(".old")
                os.replace(directory, replaced)
                try:
                    os.replace(temporary, directory)
                except OSError:
                    os.replace(replaced, directory)
                    raise
                shutil.rmtree(replaced)
            else:
                os.replace(temporary, directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _open_up(path: Path) -> None:
    """Set the usual permissions of new files: temporary files, and those of safetensors, are private."""
    os.umask(mask := os.umask(0))
    for written in (path, *path.rglob("*")):
        os.chmod(written, (0o777 if written.is_dir() else 0o666) & ~mask)


def hash_file(path: Path, more: str = "") -> str:
    """SHA-256 of a file's bytes, followed by more text."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(more.encode())
    return digest.hexdigest()


def check_hash(found: str, recorded: object, path: Path) -> None:
    """Raise ModelError where a file's hash differs from the recorded one."""
    if found != recorded:
        raise ModelError(f"{str(path)!r} is damaged: SHA-256 {found[:12]}..., recorded {str(recorded)[:12]}...")
