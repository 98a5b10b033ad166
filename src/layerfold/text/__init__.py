"""Text: corpora, labelled texts, splits, token windows, words."""
