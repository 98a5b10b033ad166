"""Searches: which blocks to drop."""

from layerfold.search.chosen import best_drop
from layerfold.search.drop import DropSearch
from layerfold.search.found import Candidate, Found

__all__ = ["Candidate", "DropSearch", "Found", "best_drop"]
