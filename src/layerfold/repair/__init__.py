"""Repair: least squares and statistics adjust what is left to imitate the original, without training."""
