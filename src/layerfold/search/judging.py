"""What a search says of its texts, and of what it chose on the one that took no part in choosing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerfold.checkpoint.model import Model
from layerfold.environment import environment
from layerfold.evaluators import Latency, Perplexity
from layerfold.files import hash_json
from layerfold.maths.intervals import Floats, Interval, exponential, ratio_interval
from layerfold.methods.drop import Part
from layerfold.progress import Progress
from layerfold.records import Record, RecordStore
from layerfold.search.results import HeldOut, Timing
from layerfold.search.stages import Blocks, removable


def describe(text: Perplexity, model: Model) -> dict[str, Any]:
    """Return corpus, split, tokens and hashes of a text, as JSON."""
    return {**text.settings(model), "protocol": text.protocol_id, "tokens": text.windows(model).tokens}


def judged(nats: Mapping[Blocks, Floats], tokens: Floats) -> dict[Blocks, HeldOut]:
    """Return what candidates score on a text, each beside the model as it is, which is one of them.

    Args:
        nats: by candidate, (units,) sums over the tokens of each unit of the text.
        tokens: (units,), how many those are.
    """
    return {
        blocks: HeldOut(
            perplexity=ratio_interval(each, tokens).map(exponential),
            versus_base=ratio_interval(each - nats[()], tokens).map(exponential),
        )
        for blocks, each in nats.items()
    }


def latency(model: Model, rounds: int) -> Latency:
    """Return the usual measurement, in a model's context."""
    usual, half = Latency(), model.decoder.context // 2
    return Latency(rounds=rounds, prompt_tokens=min(usual.prompt_tokens, half), new_tokens=min(usual.new_tokens, half))


def time_depths(
    model: Model, sha256: str, part: Part, counts: Sequence[int], rounds: int, folder: Path | None, progress: Progress
) -> dict[int, Timing]:
    """Time the model as it is and without so many blocks (or attentions, or FFNs), interleaved.

    Which ones are gone is taken not to matter, as it does not where all blocks are of one shape: the last blocks, or
    the first attentions or FFNs that are there.

    Args:
        sha256: hash of the model's weights.
        counts: how many are removed, of each architecture.
        rounds: see `Latency`.
        folder: where records are kept; what stands there is not timed again.
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
    kept = {} if store is None else {label: store.get(measure.name, keys[label], label) for label in labels}
    if kept and all(record is not None and record.score.get("value") for record in kept.values()):
        return {int(label): _timing(record.score) for label, record in kept.items() if record is not None}
    scores = measure.compare({label: _without(model, part, int(label)) for label in labels}, progress)
    if store is not None:
        for label, score in scores.items():
            found = environment()
            record = Record(
                keys[label], label, measure.name, measure.protocol_id, score.to_json(), subject, {}, found, 0.0
            )
            store.put(record)
    return {int(label): _timing(score.to_json()) for label, score in scores.items()}


def _without(model: Model, part: Part, count: int) -> Model:
    """A model of the architecture that is left when so many are removed."""
    decoder = model.decoder.copy(share=True)
    if part == "block":
        decoder.keep_(range(decoder.n_blocks - count))
    else:
        decoder.remove_(part, removable(decoder, part)[:count])
    return model.of(decoder)


def _timing(score: dict[str, Any]) -> Timing:
    speedup = score.get("speedup", {"value": 1.0, "low": 1.0, "high": 1.0})
    return Timing(
        Interval(score["value"], score["low"], score["high"]),
        Interval(speedup["value"], speedup["low"], speedup["high"]),
    )
