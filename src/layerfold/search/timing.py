"""How fast each depth is: latency depends on the architecture only, so all depths are timed once, in turn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerfold.evaluators import Latency
from layerfold.hub import Model
from layerfold.methods.drop import Part
from layerfold.progress import Progress
from layerfold.records import Record, RecordStore, environment, hash_json
from layerfold.search.found import Timing
from layerfold.statistics import Interval


def time_depths(
    model: Model, part: Part, counts: Sequence[int], rounds: int, folder: Path | None, progress: Progress
) -> dict[int, Timing]:
    """Time the model as it is and without so many blocks (or attentions, or FFNs), interleaved.

    Args:
        counts: how many are removed, of each architecture.
        rounds: see `Latency`.
        folder: where records are kept; what stands there is not timed again.
    """
    usual = Latency()
    half = model.decoder.context // 2
    latency = Latency(
        rounds=rounds,
        prompt_tokens=min(usual.prompt_tokens, half),
        new_tokens=min(usual.new_tokens, half),
    )
    labels = ["0", *map(str, counts)]
    subject = {
        "model_sha256": model.sha256,
        "part": part,
        "removed": labels,
        "protocol": latency.protocol_id,
        **latency.settings(model),
    }
    store = None if folder is None else RecordStore(folder / "records")
    keys = {label: hash_json(subject | {"label": label}) for label in labels}
    kept = {} if store is None else {label: store.get(latency.name, keys[label], label) for label in labels}
    if kept and all(kept.values()):
        return {int(label): _timing(record.score) for label, record in kept.items() if record is not None}
    scores = latency.compare({label: _without(model, part, int(label)) for label in labels}, progress)
    if store is not None:
        for label, score in scores.items():
            found = environment()
            record = Record(
                keys[label], label, latency.name, latency.protocol_id, score.to_json(), subject, {}, found, 0.0
            )
            store.put(record)
    return {int(label): _timing(score.to_json()) for label, score in scores.items()}


def _without(model: Model, part: Part, count: int) -> Model:
    """A model of the architecture that is left when so many are removed; which ones does not matter to the time."""
    decoder = model.decoder.copy(share=True)
    if part == "block":
        decoder.keep_(range(decoder.n_blocks - count))
    else:
        there = [index for index in range(decoder.n_blocks) if index not in decoder.removed_parts[part]]
        decoder.remove_(part, there[:count])
    return Model(decoder, model.tokenizer, model.provenance)


def _timing(score: dict[str, Any]) -> Timing:
    speedup = score.get("speedup", {"value": 1.0, "low": 1.0, "high": 1.0})
    return Timing(
        Interval(score["value"], score["low"], score["high"]),
        Interval(speedup["value"], speedup["low"], speedup["high"]),
    )
