"""Methods, one file each, by the name they have in recipes and commands."""

from layerfold.methods.base import Method
from layerfold.methods.collapse import Collapse
from layerfold.methods.merge import Merge

METHODS: dict[str, type[Merge] | type[Collapse]] = {Merge.name: Merge, Collapse.name: Collapse}

__all__ = ["METHODS", "Collapse", "Merge", "Method"]
