"""Methods, one file each, by the name they have in recipes and commands."""

from layerfold.methods.base import Method
from layerfold.methods.collapse import Collapse
from layerfold.methods.drop import Drop
from layerfold.methods.merge import Merge
from layerfold.methods.prune.method import Prune
from layerfold.methods.share.method import Share
from layerfold.methods.steps import Steps

METHODS: dict[str, type[Method]] = {each.name: each for each in (Merge, Collapse, Drop, Prune, Share)}

__all__ = ["METHODS", "Collapse", "Drop", "Merge", "Method", "Prune", "Share", "Steps"]
