"""What a finished search chose, read back from its file."""

from __future__ import annotations

import json
from pathlib import Path

from layerfold.checkpoint.model import Model
from layerfold.errors import InputError
from layerfold.methods.drop import Drop, spelled
from layerfold.search.found import FORMAT_VERSION


def best_drop(file: Path, model: Model, remove: int | None = None, *, repaired: bool = True) -> Drop:
    """Return the drop that a search found best for a model.

    Args:
        file: what `DropSearch` or ``layerfold search drop --json`` wrote.
        model: the one that was searched.
        remove: how many blocks; None where the search tells of one number only.
        repaired: whether a repair will follow, which a search for what is best with one takes for granted.

    Raises:
        InputError: the file is none of those, or of another model, or does not tell of that number.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        version, sha256, part = document["format_version"], document["model_sha256"], document["settings"]["part"]
        best = {int(count): spelled(row["removed"]) for count, row in document["best"].items()}
        if document["search"] != "drop":
            raise ValueError("not a search for what to drop")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise InputError(f"search file {str(file)!r} cannot be read ({reason}); accepted: a search.json") from error
    if version != FORMAT_VERSION:
        raise InputError(f"search file {str(file)!r} is of version {version!r}; accepted: {FORMAT_VERSION}")
    if sha256 != model.sha256:
        raise InputError(
            f"search file {str(file)!r} is of another model: weights {str(sha256)[:12]}... ({document.get('model')}), "
            f"these are {model.sha256[:12]}... ({model.name})"
        )
    if not repaired and document["settings"].get("objective") == "repaired":
        raise InputError(
            f"search file {str(file)!r} tells what is best to drop before a repair, and none is to follow; accepted: "
            "repair refit+attention, or another search"
        )
    if remove is None and len(best) == 1:
        (remove,) = best
    if remove not in best:
        accepted = ", ".join(map(str, sorted(best))) or "none"
        raise InputError(f"remove {remove}; accepted: what the search {str(file)!r} tells of: {accepted}")
    return Drop(blocks=best[remove], part=part)
