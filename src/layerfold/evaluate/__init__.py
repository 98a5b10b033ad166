"""Evaluators, one file each, by the name they have in recipes and commands."""

from layerfold.evaluate.base import Comparison, Evaluator, Score
from layerfold.evaluate.generation import Generation
from layerfold.evaluate.latency import Latency
from layerfold.evaluate.perplexity import Perplexity
from layerfold.evaluate.size import Size

EVALUATORS: dict[str, type[Size] | type[Perplexity] | type[Latency] | type[Generation]] = {
    evaluator.name: evaluator for evaluator in (Size, Perplexity, Latency, Generation)
}

__all__ = ["EVALUATORS", "Comparison", "Evaluator", "Generation", "Latency", "Perplexity", "Score", "Size"]
