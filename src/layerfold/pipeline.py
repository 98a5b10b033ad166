"""A method, and a repair if one follows, done to a model whose provenance says so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

from torch.nn import Module

from layerfold.calibration import Calibration
from layerfold.checkpoint.model import Model
from layerfold.evaluators import Perplexity
from layerfold.methods import METHODS, Method
from layerfold.methods.base import Notes
from layerfold.model.decoder import Decoder, check_precision
from layerfold.progress import SILENT, Progress
from layerfold.repair import repair as repairs
from layerfold.repair.repair import Repair
from layerfold.repair.rescale import Sources
from layerfold.search.auto import settled
from layerfold.text.windows import TokenWindows


def apply(
    model: Model,
    method: Method,
    calibration: Calibration | None,
    seed: int,
    selection: Perplexity,
    progress: Progress = SILENT,
    repair: Repair | None = None,
    searched: Notes | None = None,
) -> tuple[Model, Notes]:
    """Edit the model's decoder in place; return it with what was done added to its provenance, and the notes on it.

    Args:
        calibration: of the model, where the method needs one.
        selection: what candidates are scored on where the method leaves something to a search.
        repair: what follows the method; it needs a copy of the decoder as it is now.
        searched: notes of the search that the method is the result of, where there was one before.

    Raises:
        InputError: a method, a search or a repair that reads activations, of a model with weights of several dtypes.
    """
    if method.needs_calibration or repair is not None:
        check_precision(model.decoder)
    method, found = settled(method, model, calibration, selection, progress)
    notes = found or searched or {}
    if model.provenance.base_sha256 is None and not model.provenance.steps:
        # A model that `load` did not make: it is known by its weights from now on.
        model = replace(model, provenance=replace(model.provenance, base_sha256=model.sha256))
    decoder, before = model.decoder, [block.module for block in model.decoder.blocks]
    original, sources = decoder, cast(Sources, {})
    if repair is not None:
        sources = repair.sources(method, decoder, calibration)
        # Weights that the method does not write into are shared: a repair first copies the matrices that it refits.
        original = decoder.copy(share=not method.writes)
    for number, each in enumerate(method.steps):
        text = calibration if each.needs_calibration else None
        if text is not None and number:
            text = text.of(decoder)  # as the steps before left it
        model, found = _done(model, each, text, {} if number else notes, seed)
        notes = _together(notes, found)
    if repair is None:
        return model, notes
    done = repair.apply(decoder, original, _places(before, decoder), sources, progress)
    step = {
        "method": repair.resolved(),
        "seed": seed,
        "calibration": _described(repair.windows),
        "notes": done,
    }
    return model.with_step(step), _together(notes, done)


def told(method: dict[str, Any], notes: Notes) -> Iterator[str]:
    """Say, a line each, what a step in a model's provenance did besides what the sizes say."""
    if method["name"] == Repair.name:
        return repairs.told(notes)
    return METHODS[method["name"]].told(method, notes) if method["name"] in METHODS else iter(())


def _done(
    model: Model, method: Method, calibration: Calibration | None, searched: Notes, seed: int
) -> tuple[Model, Notes]:
    """Edit by one method."""
    resolved = method.resolved(model.decoder)
    before = [block.module for block in model.decoder.blocks]
    notes = searched | method.apply(model.decoder, calibration)
    step = {
        "method": resolved,
        "seed": seed,
        "calibration": None if calibration is None else _described(calibration.windows),
        "notes": notes,
        "kept_blocks": _places(before, model.decoder),
    }
    return model.with_step(step), notes


def _together(notes: Notes, more: Notes) -> Notes:
    """Return the notes of one step after another: of what both say the last, but every warning."""
    warnings = [each["warning"] for each in (notes, more) if "warning" in each]
    return notes | more | ({"warning": "; ".join(dict.fromkeys(warnings))} if warnings else {})


def _places(before: list[Module], decoder: Decoder) -> list[int]:
    """Say which blocks are left, by what the decoder is now, not by what a method says: no method need know."""
    return [before.index(block.module) for block in decoder.blocks]


def _described(windows: TokenWindows) -> dict[str, Any]:
    """Say what calibration text was read."""
    return {
        "corpus": windows.corpus,
        "split": windows.split,
        "tokens": int(windows.lengths.sum()),
        "context": windows.context,
        "corpus_sha256": windows.corpus_sha256,
        "tokens_sha256": windows.sha256,
    }
