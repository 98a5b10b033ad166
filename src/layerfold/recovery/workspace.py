"""The folder that a run works in: whose it is, and what may be removed."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from layerfold.errors import InputError, LayerfoldError, OutputError, TrainingError
from layerfold.files import write_text
from layerfold.recovery.processes import is_main, this_process

_SETTINGS = "recovery.json"
_TRACKED = "runs"
"""Where TensorBoard's callback writes, below the run's folder."""


def claim(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Take a folder for a run with these settings, or find that it is theirs already.

    Args:
        overwrite: begin anew where it holds a run with others.

    Raises:
        InputError: it holds a run with others; names them.
        OutputError: it holds something else.
    """
    # One process looks and decides for all: another would see the folder as the first has left it.
    refusals: list[LayerfoldError | None] = [None]
    if is_main():
        try:
            _claim(folder, settings, overwrite)
        except LayerfoldError as error:
            refusals = [error]
    if this_process().num_processes > 1:
        broadcast_object_list(refusals)
    if refusals[0] is not None:
        raise refusals[0]


def _claim(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    path = folder / _SETTINGS
    known = _read_json(path)
    held = folder.is_dir() and any(each.suffix != ".tmp" and each.name != _TRACKED for each in folder.iterdir())
    if held and known is None:
        raise OutputError(f"the folder {str(folder)!r} holds something other than a training run")
    if known is not None and known != settings:
        if not overwrite:
            changed = [key for key in {**known, **settings} if known.get(key) != settings.get(key)]
            told = ", ".join(f"{key} was {known.get(key)!r:.40} and is {settings.get(key)!r:.40}" for key in changed)
            raise InputError(f"the run in {str(folder)!r} was begun with other settings: {told}")
        _empty(folder)
        known = None
    if known is None:
        write_text(path, json.dumps(settings, indent=1))


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a folder, the same in all processes; it stays where a run in it diverged, for it keeps a checkpoint."""
    names = [tempfile.mkdtemp(prefix="layerfold-") if is_main() else ""]
    if this_process().num_processes > 1:
        broadcast_object_list(names)
    try:
        yield Path(names[0])
    except TrainingError:
        raise
    except BaseException:
        shutil.rmtree(names[0], ignore_errors=True)
        raise
    this_process().wait_for_everyone()
    shutil.rmtree(names[0], ignore_errors=True)


def clear(folder: Path) -> None:
    """Remove a run's files, once the recovered model is safe elsewhere; what a tracker wrote there stays."""
    if is_main() and folder.is_dir():
        _empty(folder)
    this_process().wait_for_everyone()


def _empty(folder: Path) -> None:
    # What says whose folder it is goes last, so that one half emptied is still known.
    for path in sorted(folder.iterdir(), key=lambda path: path.name == _SETTINGS):
        if path.name != _TRACKED:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
