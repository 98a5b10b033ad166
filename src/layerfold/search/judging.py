"""What a search says of its texts, and of what it chose on the one that took no part in choosing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from layerfold.evaluators import Perplexity
from layerfold.hub import Model
from layerfold.search.found import HeldOut
from layerfold.search.scores import Scores
from layerfold.search.stages import Blocks
from layerfold.statistics import bootstrap_ratio, exponential


def describe(text: Perplexity, model: Model) -> dict[str, Any]:
    """Return corpus, split, tokens and hashes of a text, as JSON."""
    return {**text.settings(model), "protocol": text.protocol_id, "tokens": text.windows(model).tokens}


def judged(scores: Scores, winners: Sequence[Blocks]) -> dict[Blocks, HeldOut]:
    """Return what candidates score on a text, each beside the model as it is, which is one of them."""
    nats = {blocks: scores.values(blocks, "perplexity") for blocks in winners}
    return {
        blocks: HeldOut(
            perplexity=bootstrap_ratio(each, scores.tokens).map(exponential),
            versus_base=bootstrap_ratio(each - nats[()], scores.tokens).map(exponential),
        )
        for blocks, each in nats.items()
    }
