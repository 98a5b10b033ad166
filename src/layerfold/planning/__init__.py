"""Plans: the best model within a budget, over all methods with and without repair."""

from layerfold.planning.budget import Budget
from layerfold.planning.plan import Plan
from layerfold.planning.results import Planned
from layerfold.planning.trials import Evaluation

__all__ = ["Budget", "Evaluation", "Plan", "Planned"]
