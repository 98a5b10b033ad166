"""Memory: how much is free, and tensors that are in files."""
