"""The folder of a run: which run it belongs to, and which of its files may be removed."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layerfold.errors import InputError, LayerfoldError, OutputError, TrainingError
from layerfold.files import write_text
from layerfold.recovery.processes import from_main, is_main, this_process

_SETTINGS = "recovery.json"
_TRACKED = "runs"
"""Name of TensorBoard's folder in the run's."""


def claim(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Reserve a folder for a run with these settings; a folder that already has them is not changed.

    Args:
        overwrite: start again where the folder holds a run with other settings.

    Raises:
        InputError: the folder holds a run with other settings, which the message names.
        OutputError: the folder holds something else.
    """
    # One process decides for all: another would see the folder after the first one's changes.
    if (refusal := from_main(lambda: _refusal(folder, settings, overwrite))) is not None:
        raise refusal


def _refusal(folder: Path, settings: dict[str, Any], overwrite: bool) -> LayerfoldError | None:
    """Write the settings into the folder, and return None; or return the error of a folder that cannot be used."""
    path = folder / _SETTINGS
    known = _read_json(path)
    held = folder.is_dir() and any(path.suffix != ".tmp" and path.name != _TRACKED for path in folder.iterdir())
    if known == settings:
        return None
    if held and known is None:
        return OutputError(f"the folder {str(folder)!r} holds something other than a training run")
    if known is not None and not overwrite:
        changed = [key for key in {**known, **settings} if known.get(key) != settings.get(key)]
        told = ", ".join(f"{key} was {known.get(key)!r:.40} and is {settings.get(key)!r:.40}" for key in changed)
        return InputError(f"the run in {str(folder)!r} was begun with other settings: {told}")
    try:
        if known is not None:
            _empty(folder)
        write_text(path, json.dumps(settings, indent=1))
    except LayerfoldError as error:
        return error
    return None


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a folder, the same in all processes; it stays after a run that diverged, since it keeps a checkpoint."""
    folder = Path(from_main(lambda: tempfile.mkdtemp(prefix="layerfold-")))
    try:
        yield folder
    except TrainingError:
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    this_process().wait_for_everyone()
    shutil.rmtree(folder, ignore_errors=True)


def clear(folder: Path) -> None:
    """Remove a run's files, after the recovered model has been saved elsewhere; a tracker's files stay."""
    if is_main() and folder.is_dir():
        _empty(folder)
    this_process().wait_for_everyone()


def _empty(folder: Path) -> None:
    # The settings last: a half emptied folder still belongs to its run.
    for path in sorted(folder.iterdir(), key=lambda path: path.name == _SETTINGS):
        if path.name != _TRACKED:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None
