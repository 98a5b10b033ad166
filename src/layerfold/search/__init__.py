"""Searches: which blocks to drop, which to let share their FFNs, and which to average."""

from layerfold.search.chosen import best_drop
from layerfold.search.drop import DropSearch
from layerfold.search.found import Candidate, Found
from layerfold.search.found_windows import FoundWindows, Window
from layerfold.search.windows import WindowSearch

__all__ = ["Candidate", "DropSearch", "Found", "FoundWindows", "Window", "WindowSearch", "best_drop"]
