"""Evaluators, one file or package each, by their names in recipes and commands.

A new evaluator is a file here and a line below; from outside the package, see `layerfold.register`.
"""

from typing import Any

from layerfold.evaluators.base import Baselined as Baselined
from layerfold.evaluators.base import Evaluator as Evaluator
from layerfold.evaluators.base import HeldOut as HeldOut
from layerfold.evaluators.base import Paired as Paired
from layerfold.evaluators.base import Score as Score
from layerfold.evaluators.base import SideBySide as SideBySide
from layerfold.evaluators.classification.imdb import Imdb as Imdb
from layerfold.evaluators.generation import Generation as Generation
from layerfold.evaluators.harness import Harness as Harness
from layerfold.evaluators.latency import Latency as Latency
from layerfold.evaluators.perplexity import Perplexity as Perplexity
from layerfold.evaluators.rouge import Rouge as Rouge
from layerfold.evaluators.size import Size as Size

EVALUATORS: dict[str, type[Any]] = {
    kind.name: kind for kind in (Size, Perplexity, Latency, Generation, Imdb, Rouge, Harness)
}
