"""Thin: each block keeps some of its heads and neurons, which make up for the others."""
