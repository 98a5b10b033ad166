"""Evaluators, one file each, by the name they have in recipes and commands."""

from layerfold.evaluators.base import Comparison, Evaluator, Score
from layerfold.evaluators.generation import Generation
from layerfold.evaluators.latency import Latency
from layerfold.evaluators.perplexity import Perplexity
from layerfold.evaluators.size import Size

EVALUATORS: dict[str, type[Size] | type[Perplexity] | type[Latency] | type[Generation]] = {
    evaluator.name: evaluator for evaluator in (Size, Perplexity, Latency, Generation)
}

__all__ = ["EVALUATORS", "Comparison", "Evaluator", "Generation", "Latency", "Perplexity", "Score", "Size"]
