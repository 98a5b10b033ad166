"""Evaluators, one file each, by the name they have in recipes and commands."""

from typing import Any

from layerfold.evaluators.base import Baselined, Comparison, Evaluator, HeldOut, Score
from layerfold.evaluators.classification.imdb import Imdb
from layerfold.evaluators.generation import Generation
from layerfold.evaluators.harness import Harness
from layerfold.evaluators.latency import Latency
from layerfold.evaluators.perplexity import Perplexity
from layerfold.evaluators.rouge import Rouge
from layerfold.evaluators.size import Size

EVALUATORS: dict[str, type[Any]] = {
    evaluator.name: evaluator for evaluator in (Size, Perplexity, Latency, Generation, Imdb, Rouge, Harness)
}

__all__ = [
    "EVALUATORS",
    "Baselined",
    "Comparison",
    "Evaluator",
    "Generation",
    "Harness",
    "HeldOut",
    "Imdb",
    "Latency",
    "Perplexity",
    "Rouge",
    "Score",
    "Size",
]
