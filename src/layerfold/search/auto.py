"""What a method leaves to a search, found before it is applied: the window of `Share`, the groups of an average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from layerfold import defaults
from layerfold.calibration import Calibration
from layerfold.checkpoint.model import Model, default_corpus
from layerfold.evaluators import Perplexity
from layerfold.methods import Method
from layerfold.methods.base import Notes
from layerfold.model.decoder import check_precision
from layerfold.progress import SILENT, Progress
from layerfold.search.groups import best_groups
from layerfold.search.judging import describe
from layerfold.search.selection import RACE
from layerfold.search.share import best_window

_SEARCHES: dict[str, Callable[..., tuple[Method, Notes]]] = {"groups": best_groups, "window": best_window}


def settled(
    method: Method, model: Model, calibration: Calibration | None, text: Perplexity, progress: Progress = SILENT
) -> tuple[Method, Notes]:
    """Find by a search what a method leaves to one.

    Args:
        model: as it is now; it is left as it is.
        calibration: of the model, where the method needs one.
        text: what candidates are scored on.

    Returns:
        The method with nothing left to search, and notes that say what was scored.

    Raises:
        InputError: the model admits no candidate, or has weights of several dtypes.
    """
    if not method.searched:
        return method, {}
    check_precision(model.decoder)
    search = _SEARCHES[method.searched]
    found, notes = search(method, model.decoder, calibration, text.windows(model), progress)
    return found, {"search": {**notes, "text": describe(text, model)}}


def selected_by(method: Method, model: Model, text: Perplexity) -> dict[str, Any]:
    """Return what determines the outcome of a method's search, as JSON; nothing where it leaves nothing to one."""
    if not method.searched:
        return {}
    return {"selection": text.windows(model).sha256, "race": RACE}


def selection_text(model: Model, corpus: str | None) -> Perplexity:
    """Return the text that `settled` scores candidates on; None takes the one that fits the model."""
    name = corpus or default_corpus(model)
    return Perplexity(corpus=name, split="validation", limit_tokens=defaults.SELECTION_TOKENS)
