"""Make GPT-2-style language models smaller by working on their layers, and measure what that cost."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerfold.api import compress, evaluate, recover, register
    from layerfold.calibration import Calibration
    from layerfold.checkpoint.load import load
    from layerfold.checkpoint.model import Model
    from layerfold.errors import InputError, LayerfoldError
    from layerfold.evaluators import Evaluator, Generation, Harness, Imdb, Latency, Perplexity, Rouge, Score, Size
    from layerfold.methods import Collapse, Drop, Merge, Method, Notes, Prune, Share, Steps, Thin
    from layerfold.model.decoder import Decoder
    from layerfold.planning import Plan
    from layerfold.recovery import Distill, Finetune, LowRank
    from layerfold.search import DropSearch, WindowSearch
    from layerfold.study.recipe import Recipe, default_recipe, read_recipe
    from layerfold.study.study import Study

__version__ = "0.1.0"

_WHERE = {
    "Calibration": "calibration",
    "Collapse": "methods",
    "Decoder": "model.decoder",
    "Distill": "recovery",
    "Drop": "methods",
    "DropSearch": "search",
    "Evaluator": "evaluators",
    "Finetune": "recovery",
    "Generation": "evaluators",
    "Harness": "evaluators",
    "Imdb": "evaluators",
    "InputError": "errors",
    "Latency": "evaluators",
    "LayerfoldError": "errors",
    "LowRank": "recovery",
    "Merge": "methods",
    "Method": "methods",
    "Model": "checkpoint.model",
    "Notes": "methods",
    "Perplexity": "evaluators",
    "Plan": "planning",
    "Prune": "methods",
    "Recipe": "study.recipe",
    "Rouge": "evaluators",
    "Score": "evaluators",
    "Share": "methods",
    "Size": "evaluators",
    "Steps": "methods",
    "Study": "study.study",
    "Thin": "methods",
    "WindowSearch": "search",
    "compress": "api",
    "default_recipe": "study.recipe",
    "evaluate": "api",
    "load": "checkpoint.load",
    "read_recipe": "study.recipe",
    "recover": "api",
    "register": "api",
}

__all__ = [
    "Calibration",
    "Collapse",
    "Decoder",
    "Distill",
    "Drop",
    "DropSearch",
    "Evaluator",
    "Finetune",
    "Generation",
    "Harness",
    "Imdb",
    "InputError",
    "Latency",
    "LayerfoldError",
    "LowRank",
    "Merge",
    "Method",
    "Model",
    "Notes",
    "Perplexity",
    "Plan",
    "Prune",
    "Recipe",
    "Rouge",
    "Score",
    "Share",
    "Size",
    "Steps",
    "Study",
    "Thin",
    "WindowSearch",
    "compress",
    "default_recipe",
    "evaluate",
    "load",
    "read_recipe",
    "recover",
    "register",
]


@cache
def _register() -> None:
    """Let transformers' Auto classes load compact checkpoints, without importing transformers for it."""
    from wrapt import register_post_import_hook as when_imported

    when_imported("layerfold.checkpoint.auto:register_config", "transformers.models.auto.configuration_auto")
    when_imported("layerfold.checkpoint.auto:register_model", "transformers.models.auto.modeling_auto")


class _BeforeTransformers:
    """Registers when transformers is about to be imported: wrapt takes a tenth of a second, which `--help` can save."""

    @staticmethod
    def find_spec(name: str, *_: Any) -> None:
        if name == "transformers":
            _register()


if "transformers" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _BeforeTransformers)


def __getattr__(name: str) -> Any:
    # Imported when first used: torch takes seconds, and `layerfold --help` needs none of it.
    if name in _WHERE:
        return getattr(importlib.import_module(f"layerfold.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'layerfold' has no attribute {name!r}")
