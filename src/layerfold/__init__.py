"""Make GPT-2-style language models smaller by working on their layers, and measure what that cost."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerfold.api import compress, evaluate, recover
    from layerfold.decoder import Decoder
    from layerfold.errors import LayerfoldError
    from layerfold.evaluators import Generation, Latency, Perplexity, Score, Size
    from layerfold.hub import Model, load
    from layerfold.methods import Collapse, Drop, Merge, Prune
    from layerfold.recipe import Recipe, default_recipe, read_recipe
    from layerfold.recovery import Distill, Finetune
    from layerfold.search import DropSearch
    from layerfold.study import Study

__version__ = "0.1.0"

_WHERE = {
    "Collapse": "methods",
    "Decoder": "decoder",
    "Distill": "recovery",
    "Drop": "methods",
    "DropSearch": "search",
    "Finetune": "recovery",
    "Generation": "evaluators",
    "Latency": "evaluators",
    "LayerfoldError": "errors",
    "Merge": "methods",
    "Model": "hub",
    "Perplexity": "evaluators",
    "Prune": "methods",
    "Recipe": "recipe",
    "Score": "evaluators",
    "Size": "evaluators",
    "Study": "study",
    "compress": "api",
    "default_recipe": "recipe",
    "evaluate": "api",
    "load": "hub",
    "read_recipe": "recipe",
    "recover": "api",
}

__all__ = [
    "Collapse",
    "Decoder",
    "Distill",
    "Drop",
    "DropSearch",
    "Finetune",
    "Generation",
    "Latency",
    "LayerfoldError",
    "Merge",
    "Model",
    "Perplexity",
    "Prune",
    "Recipe",
    "Score",
    "Size",
    "Study",
    "compress",
    "default_recipe",
    "evaluate",
    "load",
    "read_recipe",
    "recover",
]


def __getattr__(name: str) -> Any:
    # Imported when first used: torch takes seconds, and `layerfold --help` needs none of it.
    if name in _WHERE:
        return getattr(importlib.import_module(f"layerfold.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'layerfold' has no attribute {name!r}")
