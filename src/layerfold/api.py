"""The same as the commands, from Python."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from layerfold import defaults
from layerfold.calibration import Calibration
from layerfold.errors import InputError, one_of
from layerfold.evaluators import EVALUATORS, Latency, Perplexity, Score
from layerfold.evaluators.base import Protocols, check_protocol
from layerfold.hub import Model, load
from layerfold.methods import Method
from layerfold.progress import SILENT, Progress
from layerfold.study import apply, calibration_windows


def compress(
    model: Model | str | Path,
    method: Method,
    *,
    corpus: str | None = None,
    tokens: int = defaults.CALIBRATION_TOKENS,
    seed: int = 0,
    in_place: bool = False,
    progress: Progress = SILENT,
) -> Model:
    """Return a smaller model.

    Args:
        model: a loaded model, or a name for `load`.
        method: for example ``Merge(n=4)``.
        corpus: calibration text, of which the ``calibration`` split is read; None takes the one that fits the model.
        tokens: how many tokens of it.
        seed: orders its documents.
        in_place: edit the given model instead of a copy, which needs no second set of weights.

    Raises:
        InputError: a setting that the model's depth does not admit.
        LayerfoldError: what `load` and `load_corpus` raise.
    """
    if not isinstance(model, Model):
        model, in_place = load(model), True
    method.resolved(model.decoder.n_blocks)
    model = model if in_place else model.copy()
    calibration = None
    if method.needs_calibration:
        calibration = Calibration(model.decoder, calibration_windows(model, corpus, tokens, seed), progress)
    compressed, _ = apply(model, method, calibration, seed)
    return compressed


def evaluate(
    model: Model | str | Path,
    metrics: Iterable[str] = tuple(EVALUATORS),
    *,
    corpus: str | None = None,
    split: str = "test",
    limit_tokens: int | None = None,
    protocol: Protocols = "sound",
    progress: Progress = SILENT,
) -> dict[str, Score]:
    """Measure a model.

    Args:
        model: a loaded model, or a name for `load`.
        metrics: names of evaluators.
        corpus, split, limit_tokens: what perplexity is measured on.
        protocol: ``published`` repeats the published measurement where there is one.

    Returns:
        Scores by metric, in the order asked for.
    """
    names = list(dict.fromkeys(metrics))
    check_protocol(protocol)
    if not names:
        raise InputError(f"no metrics; accepted: {', '.join(EVALUATORS)}")
    for name in names:
        if name not in EVALUATORS:
            raise InputError(f"unknown metric {one_of(name, EVALUATORS)}")
    settings: dict[str, dict[str, Any]] = {
        Perplexity.name: {"corpus": corpus, "split": split, "limit_tokens": limit_tokens, "protocol": protocol},
        Latency.name: {"protocol": protocol},
    }
    evaluators = [EVALUATORS[name](**settings.get(name, {})) for name in names]
    loaded = model if isinstance(model, Model) else load(model)
    return {evaluator.name: evaluator(loaded, progress) for evaluator in evaluators}
