"""Loading and saving of models: their sources, their provenance and their files."""
