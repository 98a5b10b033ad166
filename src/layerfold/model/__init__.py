"""A live view of a causal language model, whatever its family, and the edits on it."""
