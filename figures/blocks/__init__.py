"""The blocks of README and docs: tables and plots, each made from the results of one or more experiments."""

from figures.blocks import measured as measured
from figures.blocks import methods as methods
from figures.blocks import plans as plans
from figures.blocks import studies as studies
from figures.blocks.registry import BLOCKS as BLOCKS
from figures.blocks.registry import Block as Block
