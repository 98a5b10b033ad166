"""What a method leaves to a search, found before it is applied: the window of `Share`, the groups of an average."""

from __future__ import annotations

from layerfold import defaults
from layerfold.calibration import Calibration
from layerfold.checkpoint.model import Model, default_corpus
from layerfold.evaluators import Perplexity
from layerfold.methods import Collapse, Merge, Method, Share
from layerfold.methods.base import AUTO, Notes
from layerfold.progress import SILENT, Progress
from layerfold.search.groups import best_groups
from layerfold.search.judging import describe
from layerfold.search.share import best_window


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
        InputError: the model admits no candidate.
    """
    found: Method
    if isinstance(method, Share) and method.window == AUTO:
        found, notes = best_window(method, model.decoder, calibration, text.windows(model), progress)
    elif isinstance(method, Merge | Collapse) and method.groups == AUTO:
        found, notes = best_groups(method, model.decoder, calibration, text.windows(model), progress)
    else:
        return method, {}
    return found, {"search": {**notes, "text": describe(text, model)}}


def searches(method: object) -> bool:
    """Whether a method leaves something to a search."""
    return (isinstance(method, Share) and method.window == AUTO) or (
        isinstance(method, Merge | Collapse) and method.groups == AUTO
    )


def selection_text(model: Model, corpus: str | None) -> Perplexity:
    """Return the text that `settled` scores candidates on; None takes the one that fits the model."""
    name = corpus or default_corpus(model)
    return Perplexity(corpus=name, split="validation", limit_tokens=defaults.SELECTION_TOKENS)
