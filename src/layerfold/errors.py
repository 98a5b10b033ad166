"""Every exception that layerfold raises on purpose.

::

    LayerfoldError
    ├── InputError          an argument that is not accepted
    │   └── RecipeError     a study's recipe that cannot be read or does not validate
    ├── ModelError          an unsupported architecture, missing or damaged weights, a NaN
    ├── CorpusError         text that is missing, unreadable, too short, or in two splits
    ├── TrainingError       a training run that diverged
    ├── OutputError         a folder that must not or cannot be written
    ├── MissingExtraError   an optional package that is not installed (names the extra)
    └── OfflineError        the Hub cannot be reached and nothing is cached

Each message is one line: the value received and the values accepted. The command line prints it and exits with code 2;
any other exception that escapes is a defect.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LayerfoldError(Exception):
    """Base of all exceptions that layerfold raises on purpose."""


class InputError(LayerfoldError, ValueError):
    """An argument that is not accepted."""


class RecipeError(InputError):
    """A recipe that is not YAML, has an unknown key, a wrong type or a duplicate label."""


class ModelError(LayerfoldError):
    """A model that cannot be read or whose architecture is not supported."""


class CorpusError(LayerfoldError):
    """A corpus that is missing, unreadable, too short, or that shares documents with another split."""


class TrainingError(LayerfoldError):
    """A training run whose loss grew beyond all bounds."""


class OutputError(LayerfoldError, OSError):
    """An output folder that holds something else, or that cannot be written."""


class MissingExtraError(LayerfoldError, ImportError):
    """An optional package is missing.

    Args:
        package: the distribution that could not be imported.
        extra: the extra of layerfold that installs it.
        instead: an alternative that does not need it.
    """

    def __init__(self, package: str, extra: str, instead: str = "") -> None:
        otherwise = f"; accepted without it: {instead}" if instead else ""
        super().__init__(f"the package {package!r} is not installed: pip install 'layerfold[{extra}]'{otherwise}")


class OfflineError(LayerfoldError, ConnectionError):
    """The Hub cannot be reached, and the local cache does not hold the files."""


def one_of(received: str, accepted: Iterable[str]) -> str:
    """Return the end of a message: the value received, its nearest match, and the accepted values."""
    options = sorted(accepted)
    return f"{received!r}; {nearest(received, options)}accepted: {', '.join(options)}"


def check_one_of(noun: str, received: str, accepted: Iterable[str]) -> None:
    """Raise InputError, beginning with the noun, for a value that is not accepted."""
    options = list(accepted)
    if received not in options:
        raise InputError(f"{noun} {one_of(received, options)}")


def nearest(received: str, accepted: Iterable[str]) -> str:
    """Return a question that names the closest accepted value; empty where none is close."""
    near = difflib.get_close_matches(received, list(accepted), n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}? " if near else ""


def last_line(output: str) -> str:
    """Return the last line of what a program wrote that is not empty."""
    return next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "it said nothing")


def first_line(error: BaseException) -> str:
    """Return an error's first line, with the next where the first ends in a colon; the error's class if it is empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])
