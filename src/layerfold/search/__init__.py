"""Searches: which blocks to drop."""
