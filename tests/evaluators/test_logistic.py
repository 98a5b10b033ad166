"""Logistic regression: the optimum, checked by its own conditions, and which rows choose the ridge."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.sparse import csr_array

from layerfold.evaluators.classification import logistic
from layerfold.evaluators.classification.logistic import RIDGES, BagOfWords, Logistic, fit
from layerfold.maths.intervals import Floats


def made(rows: int, d: int, classes: int, noise: float = 1.0, seed: int = 0) -> tuple[Floats, np.ndarray]:
    """Random features, and labels that a linear map of them and noise gives."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(rows, d))
    labels = (features @ rng.normal(size=(d, classes)) + noise * rng.normal(size=(rows, classes))).argmax(1)
    return features, labels


def only(ridge: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logistic, "RIDGES", (ridge,))


def nats(fitted: Logistic, features: Floats, labels: np.ndarray) -> float:
    """Of each row by the textbook: -log(exp(own logit) / sum of exp)."""
    logits = features @ fitted.weights + fitted.bias
    return sum(math.log(sum(math.exp(z) for z in row)) - row[label] for row, label in zip(logits, labels, strict=True))


@pytest.mark.parametrize("ridge", [0.1, 1.0, 10.0])
def test_two_points_are_fitted_as_by_hand(ridge: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # x = -1 and 1, classes 0 and 1: by symmetry weights (-w, w), no bias; 2 log(1 + exp(-2w)) + ridge w^2 is least.
    only(ridge, monkeypatch)
    w = brentq(lambda w: -4 / (1 + math.exp(2 * w)) + 2 * ridge * w, 0, 50)
    fitted = fit(np.array([[-1.0], [1.0]]), np.array([0, 1]), 2)
    assert fitted.weights[0] == pytest.approx([-w, w], rel=1e-3)
    assert fitted.bias == pytest.approx([0, 0], abs=1e-4)
    assert fitted.ridge == ridge


def test_without_features_the_bias_is_the_log_odds(monkeypatch: pytest.MonkeyPatch) -> None:
    only(1.0, monkeypatch)
    labels = np.array([0, 1, 1, 1, 2, 2])
    for width in (0, 3):
        fitted = fit(np.zeros((6, width)), labels, 3)
        shares = np.exp(fitted.bias) / np.exp(fitted.bias).sum()
        assert shares == pytest.approx([1 / 6, 3 / 6, 2 / 6], abs=1e-4)  # the ridge is on the weights alone
        assert not fitted.weights.any()


@pytest.mark.parametrize("classes", [2, 4])
def test_the_gradient_is_zero_at_the_optimum(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    only(2.0, monkeypatch)
    features, labels = made(80, 5, classes)
    fitted = fit(features, labels, classes)
    logits = fitted.logits(features)
    error = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(classes)[labels]
    assert np.abs(features.T @ error + 2.0 * fitted.weights).max() < 0.02
    assert np.abs(error.sum(0)).max() < 0.02

    def objective(weights: Floats, bias: Floats) -> float:
        return nats(Logistic(weights, bias, 0), features, labels) + (weights**2).sum()

    rng, least = np.random.default_rng(1), objective(fitted.weights, fitted.bias)
    for _ in range(20):
        moved = (
            fitted.weights + 0.05 * rng.normal(size=fitted.weights.shape),
            fitted.bias + 0.05 * rng.normal(size=classes),
        )
        assert objective(*moved) > least


def test_many_classes_are_told_apart_on_rows_not_seen() -> None:
    features, labels = made(600, 4, 5, noise=0.05)
    fitted = fit(features[:500], labels[:500], 5)
    assert fitted.weights.shape == (4, 5)
    assert (fitted.predict(features[500:]) == labels[500:]).mean() > 0.9
    assert (fitted.predict(features) == fitted.logits(features).argmax(1)).all()


def test_sparse_features_give_what_dense_ones_give() -> None:
    rng = np.random.default_rng(0)
    dense = (rng.random((60, 12)) < 0.3).astype(np.float64)
    labels = (dense[:, 0] + dense[:, 1] - dense[:, 2] + 0.1 * rng.normal(size=60) > 0.3).astype(np.int64)
    one, two = fit(dense, labels, 2), fit(csr_array(dense), labels, 2)
    assert one.ridge == two.ridge
    assert two.weights == pytest.approx(one.weights, abs=1e-4)
    assert two.bias == pytest.approx(one.bias, abs=1e-4)
    assert (two.predict(csr_array(dense)) == one.predict(dense)).all()


@pytest.mark.parametrize(("noise", "expected"), [(0.0, RIDGES[0]), (1e9, RIDGES[-1])])
def test_the_ridge_is_chosen_on_every_fifth_row_after_fitting_to_the_others(
    noise: float, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, labels = made(100, 10, 2, noise)
    chosen = fit(features, labels, 2)
    assert chosen.ridge == expected  # by the rows that were fitted to, the least would always win
    held_out = np.arange(100) % 5 == 0
    scores = {}
    for ridge in RIDGES:
        only(ridge, monkeypatch)
        scores[ridge] = nats(fit(features[~held_out], labels[~held_out], 2), features[held_out], labels[held_out])
    assert chosen.ridge == min(scores, key=lambda ridge: scores[ridge])
    only(expected, monkeypatch)
    assert chosen.weights == pytest.approx(fit(features, labels, 2).weights)  # and then all rows are fitted to


def test_which_rows_choose_can_change_what_is_chosen() -> None:
    # The same rows; in one order noise is held out, in the other what can be learnt.
    clean, right = made(400, 3, 2, noise=0.0)
    labels = right.copy()
    labels[::5] = 1 - labels[::5]  # every held-out row says the contrary of the others
    order = np.argsort(np.arange(400) % 5 == 0, kind="stable")
    assert fit(clean, labels, 2).ridge == RIDGES[-1]
    assert fit(clean[order][:320], labels[order][:320], 2).ridge == RIDGES[0]


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_so_few_rows_are_fitted_too(rows: int) -> None:
    fitted = fit(np.arange(rows * 2.0).reshape(rows, 2), np.arange(rows) % 2, 2)
    assert np.isfinite(fitted.weights).all()
    assert np.isfinite(fitted.bias).all()


def test_a_bag_holds_which_words_there_are_and_not_how_often_or_where() -> None:
    bag = BagOfWords(["The film, the FILM!", "don't go"])
    found = bag(["film the", "the the the film", "go go unheard-of", "", "DON'T"]).toarray()
    assert found.shape == (5, 4)  # the, film, don't, go
    assert (found[0] == found[1]).all()
    assert found.sum(1).tolist() == [2, 2, 1, 0, 1]
    assert set(found.ravel()) == {0.0, 1.0}
    assert not (found[2] * found[4]).any()
    chinese = BagOfWords(["电影很好。音乐也好。", "电影很差。"])
    assert chinese(["很好", "很差"]).toarray().sum(1).tolist() == [2, 2], "characters, not sentences"
    wordless = BagOfWords(["!!!", "..."])
    fitted = fit(wordless(["!!!", "...", "?"]), np.array([1, 1, 0]), 2)
    assert fitted.predict(wordless(["word", "!!!"])).tolist() == [1, 1]
