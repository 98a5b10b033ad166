"""Methods, one file each, by the name they have in recipes and commands."""

from layerfold.methods.base import Method
from layerfold.methods.collapse import Collapse
from layerfold.methods.drop import Drop
from layerfold.methods.merge import Merge

METHODS: dict[str, type[Method]] = {Merge.name: Merge, Collapse.name: Collapse, Drop.name: Drop}

__all__ = ["METHODS", "Collapse", "Drop", "Merge", "Method"]
