"""Logistic regression on dense or sparse features, with the ridge chosen on held-out rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.sparse import csr_array
from scipy.special import log_softmax

from layerfold.maths.intervals import Floats
from layerfold.text.words import words

RIDGES = (0.1, 1.0, 10.0, 100.0)
_HELD_OUT_EVERY = 5
_STEPS = 500

Features = Any
"""(rows, d) float64, a NumPy array or a SciPy sparse one."""


@dataclass(frozen=True)
class Logistic:
    """A fitted classifier: it predicts the class with the largest logit, x @ weights + bias.

    Attributes:
        weights: (d, classes).
        bias: (classes,).
        ridge: weight of half the squared norm of `weights` in the objective, the summed nats.
    """

    weights: Floats
    bias: Floats
    ridge: float

    def logits(self, features: Features) -> Floats:
        """Return the logits, (rows, classes)."""
        logits: Floats = features @ self.weights + self.bias
        return logits

    def predict(self, features: Features) -> NDArray[np.int64]:
        """Return the class of each row, (rows,)."""
        classes: NDArray[np.int64] = np.argmax(self.logits(features), axis=1)
        return classes


def fit(features: Features, labels: NDArray[np.int64], classes: int) -> Logistic:
    """Fit to all rows, with the best ridge of `RIDGES` for every fifth row after a fit to the others.

    Args:
        labels: (rows,), each from 0 to `classes` - 1.
    """
    held_out = np.arange(len(labels)) % _HELD_OUT_EVERY == 0
    ridge = RIDGES[len(RIDGES) // 2]
    if held_out.any() and not held_out.all():

        def nats(ridge: float) -> float:
            fitted = _fit(features[~held_out], labels[~held_out], classes, ridge)
            return _nats(fitted.logits(features[held_out]), labels[held_out])

        ridge = min(RIDGES, key=nats)
    return _fit(features, labels, classes, ridge)


def _fit(features: Features, labels: NDArray[np.int64], classes: int, ridge: float) -> Logistic:
    d = features.shape[1]
    target = np.eye(classes)[labels]

    def objective(flat: Floats) -> tuple[float, Floats]:
        weights, bias = flat[: d * classes].reshape(d, classes), flat[d * classes :]
        log_probabilities = log_softmax(features @ weights + bias, axis=1)
        error = np.exp(log_probabilities) - target
        value = -(log_probabilities * target).sum() + ridge / 2 * (weights**2).sum()
        return float(value), np.concatenate([(features.T @ error + ridge * weights).ravel(), error.sum(0)])

    found = minimize(objective, np.zeros((d + 1) * classes), jac=True, method="L-BFGS-B", options={"maxiter": _STEPS}).x
    return Logistic(found[: d * classes].reshape(d, classes), found[d * classes :], ridge)


def _nats(logits: Floats, labels: NDArray[np.int64]) -> float:
    return float(-log_softmax(logits, axis=1)[np.arange(len(labels)), labels].sum())


class BagOfWords:
    """Presence of words in a text, whatever their order and number.

    Args:
        texts: texts that give the vocabulary; other words are ignored.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._column: dict[str, int] = {}
        for text in texts:
            for word in sorted(set(words(text))):
                self._column.setdefault(word, len(self._column))

    def __call__(self, texts: Iterable[str]) -> csr_array:
        """Return (texts, words), 1 where the text holds the word."""
        columns = [[self._column[word] for word in sorted(set(words(text))) if word in self._column] for text in texts]
        ends = np.cumsum([0, *map(len, columns)])
        flat = np.array([column for row in columns for column in row], dtype=np.int64)
        return csr_array((np.ones(len(flat)), flat, ends), shape=(len(columns), len(self._column)))
