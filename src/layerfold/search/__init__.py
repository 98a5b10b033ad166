"""Searches: which blocks to drop, which to let share their FFNs, and which to average."""

from layerfold.search.drop import DropSearch
from layerfold.search.results import Candidate, Found, FoundWindows, Window, best_drop
from layerfold.search.share import WindowSearch

__all__ = ["Candidate", "DropSearch", "Found", "FoundWindows", "Window", "WindowSearch", "best_drop"]
