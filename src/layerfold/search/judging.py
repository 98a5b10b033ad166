"""What a search says of its texts, and of what it chose on the one that took no part in choosing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerfold.checkpoint.model import Model
from layerfold.evaluators import Perplexity
from layerfold.maths.intervals import Floats, exponential, ratio_interval
from layerfold.search.found import HeldOut
from layerfold.search.stages import Blocks


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
