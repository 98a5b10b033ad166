"""Loading and saving: where models come from, what was done to them, and the files that they are kept in."""
