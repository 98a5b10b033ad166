"""Recipes that come with layerfold, as documents like those that are read from files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerfold import defaults

DEFAULT_EVALUATORS = ("size", {"perplexity": {"limit_tokens": defaults.LIMIT_TOKENS}}, "latency", "generation")

_PUBLISHED = [
    *({"label": f"merged_{n}", "merge": {"n": n}} for n in defaults.GROUP_SIZES),
    *({"label": f"compressed_{n}", "collapse": {"n": n}} for n in defaults.GROUP_SIZES),
    # The fraction of the parameters that the published model leaves of GPT-2's.
    {"label": "pruned_104M", "prune": {"nonzero": defaults.PRUNED}},
    {"label": "shared_4x8", "share": {"window": "auto", "k": 4, "rank": 8}},
]
_REPAIRED = {"label": "repaired_drop_6", "drop": {"every": 2}, "repair": "refit+attention"}
_PLANNED = {"label": "planned_82M", "plan": {"parameters": defaults.PLANNED}}
_DISTILGPT2 = {"gpt2": "distilgpt2", "openai-community/gpt2": "distilbert/distilgpt2"}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # The published comparison, half of the blocks with a repair, and a plan; nothing trained.
    "default": {"variants": [*_PUBLISHED, _REPAIRED, _PLANNED], "evaluate": list(DEFAULT_EVALUATORS)},
    # All of the published study: a distilled model beside the others, every row trained alike, and all the tasks.
    "full": {
        "variants": [{"label": "distilled", "student": {"published": _DISTILGPT2}}, *_PUBLISHED],
        "evaluate": [*DEFAULT_EVALUATORS, "imdb", "rouge"],
        "recovery": {"finetune": {"tokens": 24_576}},
    },
}
