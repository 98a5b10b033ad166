"""The teacher of a model, and the teacher's counterpart of each of the model's blocks."""

from __future__ import annotations

from layerfold.checkpoint.load import load_beside
from layerfold.checkpoint.model import Model
from layerfold.errors import InputError, LayerfoldError
from layerfold.recovery.base import Recovery
from layerfold.recovery.distill import Distill
from layerfold.text.windows import TokenWindows

_NAME_ONE = "name one with --teacher (from Python, teacher=)"


def default_teacher(model: Model) -> Model:
    """Load the model that this one was made from, identified by the hash of its weights.

    Raises:
        InputError: the base cannot be found, or has changed.
    """
    provenance = model.provenance
    refusal = ""
    # The base's path relative to the checkpoint, then the name by which it was loaded.
    for name in dict.fromkeys(filter(None, (provenance.location, provenance.base))):
        try:
            teacher = load_beside(model, name, revision=provenance.revision)
        except LayerfoldError as error:
            refusal = refusal or f"cannot be loaded: {error}"
            continue
        if teacher.sha256 == provenance.base_sha256:
            return teacher
        refusal = "is no longer what this model was made from"
    raise InputError(f"no teacher was named, and the base {provenance.base!r} {refusal}; {_NAME_ONE}")


def check_teacher(model: Model, teacher: Model, recovery: Recovery, windows: TokenWindows, sample: str) -> None:
    """Raise InputError where the teacher cannot read the text, or its logits are for other tokens.

    Args:
        windows: the training text.
        sample: text that both tokenizers must cut alike.
    """
    name = teacher.provenance.base
    sizes = [int(side.decoder.model.config.vocab_size) for side in (teacher, model)]
    if sizes[0] != sizes[1]:
        raise InputError(f"teacher {name!r} has a vocabulary of {sizes[0]:,} tokens, the model one of {sizes[1]:,}")
    theirs, own = teacher.require_tokenizer(), model.require_tokenizer()
    if theirs.get_vocab() != own.get_vocab() or theirs.encode(sample, verbose=False) != own.encode(
        sample, verbose=False
    ):
        raise InputError(f"teacher {name!r} has another tokenizer than the model: their logits are of other tokens")
    if windows.context > teacher.decoder.context:
        raise InputError(
            f"context {windows.context}; accepted: 2 ... {teacher.decoder.context} (the maximum of teacher {name!r})"
        )
    if not recovery.needs_hidden_states:
        return
    widths = teacher.decoder.d_model, model.decoder.d_model
    if widths[0] != widths[1]:
        raise InputError(
            f"hidden_weight: teacher {name!r} is {widths[0]} wide, the model {widths[1]}; accepted: the same width"
        )


def counterparts(model: Model, teacher: Model, recovery: Recovery) -> tuple[int, ...]:
    """Return, for each block of the model, the index of the teacher's block whose output it should imitate.

    A kept block imitates the output of the last block before the next kept one. Where the teacher is not the model's
    base, its depth is divided evenly.
    """
    own, theirs = model.decoder.n_blocks, teacher.decoder.n_blocks
    given = recovery.counterparts if isinstance(recovery, Distill) else None
    if given is not None:
        if len(given) != own or max(given) >= theirs:
            raise InputError(
                f"counterparts {list(given)}; accepted: {own} indices, one for each block, in 0 ... {theirs - 1}"
            )
        return given
    base = model.provenance.base_sha256
    kept = kept_blocks(model, theirs) if base is not None and base == teacher.sha256 else []
    if len(kept) != own:
        return tuple(max(0, (index + 1) * theirs // own - 1) for index in range(own))
    return (*(following - 1 for following in kept[1:]), theirs - 1)


def kept_blocks(model: Model, n_blocks: int) -> list[int]:
    """Return the indices of the base's blocks that a model keeps, by its provenance."""
    kept = list(range(n_blocks))
    for step in model.provenance.steps:
        indices = step.get("kept_blocks")
        if indices is not None:
            kept = [kept[index] for index in indices if index < len(kept)]
    return kept
