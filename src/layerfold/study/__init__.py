"""Studies: a recipe, its rows, how each is made, and how all are measured alike."""
