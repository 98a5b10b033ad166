"""Accuracy on labelled texts: a classifier made from the model, and a bag-of-words baseline."""
