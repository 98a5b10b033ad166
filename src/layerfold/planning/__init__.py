"""Plans: the best model within a budget, of what all methods and their repaired forms come to."""

from layerfold.planning.budget import Budget
from layerfold.planning.plan import Plan
from layerfold.planning.results import Planned
from layerfold.planning.trials import Trial

__all__ = ["Budget", "Plan", "Planned", "Trial"]
