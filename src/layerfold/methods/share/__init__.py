"""Sharing: one FFN for a window of blocks, with a low-rank delta for each."""
