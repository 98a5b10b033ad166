"""Methods, one file or package each, by the name they have in recipes and commands.

A new one is a file beside the others, and a line here. From outside the package, see `layerfold.register`.
"""

from layerfold.methods.base import Method as Method
from layerfold.methods.base import Notes as Notes
from layerfold.methods.collapse import Collapse as Collapse
from layerfold.methods.drop import Drop as Drop
from layerfold.methods.merge import Merge as Merge
from layerfold.methods.prune.method import Prune as Prune
from layerfold.methods.share.method import Share as Share
from layerfold.methods.steps import Steps as Steps
from layerfold.methods.thin.method import Thin as Thin

METHODS: dict[str, type[Method]] = {each.name: each for each in (Collapse, Drop, Merge, Prune, Share, Thin)}
