"""Pruning: single weights are zeroed, or neurons and heads removed, to a budget."""
