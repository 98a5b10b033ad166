"""Tensors in, tensors out: matching, least squares, moments, intervals, ranking."""
