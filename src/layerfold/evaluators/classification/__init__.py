"""Accuracy on labelled texts: a classifier made of the model, and a bag of words beside it."""
