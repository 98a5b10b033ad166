"""Texts described, scores on the test text, and latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerfold.checkpoint.model import Model
from layerfold.environment import environment
from layerfold.errors import InputError
from layerfold.evaluators import Latency, Perplexity
from layerfold.files import hash_json
from layerfold.maths.intervals import Floats, Interval, exponential, ratio_interval
from layerfold.methods.drop import Part
from layerfold.progress import Progress
from layerfold.records import Record, RecordStore
from layerfold.search.results import HeldOutScore, Timing
from layerfold.search.stages import Blocks, removable

_SAME = {"value": 1.0, "low": 1.0, "high": 1.0}


def describe(text: Perplexity, model: Model) -> dict[str, Any]:
    """Return corpus, split, tokens and hashes of a text, as JSON."""
    return {**text.settings(model), "protocol": text.protocol_id, "tokens": text.windows(model).tokens}


def judged(nats: Mapping[Blocks, Floats], tokens: Floats) -> dict[Blocks, HeldOutScore]:
    """Return scores on a text, each beside the model's, which is under ().

    Args:
        nats: by candidate, (units,) sums over the tokens of each unit of the text.
        tokens: (units,), how many tokens each unit has.
    """
    return {
        blocks: HeldOutScore(
            perplexity=ratio_interval(sums, tokens).map(exponential),
            versus_base=ratio_interval(sums - nats[()], tokens).map(exponential),
        )
        for blocks, sums in nats.items()
    }


def check_rounds(rounds: int) -> None:
    """Raise InputError for a number of rounds that times something, but not enough."""
    if rounds != 0 and rounds < 3:
        raise InputError(f"rounds {rounds}; accepted: 0 (nothing is timed), or 3 or more")


def latency(model: Model, rounds: int) -> Latency:
    """Return the usual measurement, in a model's context."""
    usual, half = Latency(), model.decoder.context // 2
    return Latency(rounds=rounds, prompt_tokens=min(usual.prompt_tokens, half), new_tokens=min(usual.new_tokens, half))


def timing(score: Mapping[str, Any]) -> Timing:
    """Read a latency score, as JSON; a model that was timed alone is as fast as itself."""
    speedup = score.get("speedup", _SAME)
    return Timing(*(Interval(*(each[bound] for bound in _SAME)) for each in (score, speedup)))


def time_depths(
    model: Model, sha256: str, part: Part, counts: Sequence[int], rounds: int, folder: Path | None, progress: Progress
) -> dict[int, Timing]:
    """Time the model, and the model without some of its blocks (or attentions, or FFNs), interleaved.

    The last blocks go, or the first attentions or FFNs: which ones does not matter where all blocks have one shape.

    Args:
        sha256: hash of the model's weights.
        counts: how many are removed, of each architecture.
        rounds: see `Latency`.
        folder: where records are kept; architectures that were timed there are not timed again.
    """
    measure = latency(model, rounds)
    labels = ["0", *map(str, counts)]
    subject = {
        "model_sha256": sha256,
        "part": part,
        "removed": labels,
        "protocol": measure.protocol_id,
        **measure.settings(model),
    }
    store = None if folder is None else RecordStore(folder / "records")
    keys = {label: hash_json(subject | {"label": label}) for label in labels}
    kept = [] if store is None else [store.get(measure.name, keys[label], label) for label in labels]
    scores = {record.label: record.score for record in kept if record is not None and record.score.get("value")}
    if len(scores) < len(labels):
        timed = measure.compare({label: _without(model, part, int(label)) for label in labels}, progress)
        scores = {label: score.to_json() for label, score in timed.items()}
        ran = measure.name, measure.protocol_id
        for label, score in scores.items():
            if store is not None:
                store.put(
                    Record(keys[label], label, *ran, score, subject, {}, environment() | model.decoder.computed, 0.0)
                )
    return {int(label): timing(score) for label, score in scores.items()}


def _without(model: Model, part: Part, count: int) -> Model:
    """The model with so many blocks (or attentions, or FFNs) removed."""
    decoder = model.decoder.copy(share=True)
    if part == "block":
        decoder.keep_(range(decoder.n_blocks - count))
    else:
        decoder.remove_(part, removable(decoder, part)[:count])
    return model.of(decoder)
