"""Accuracy of a classifier made from a model, on IMDb's reviews or other labelled texts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch

from layerfold.checkpoint.model import Model, is_pocket
from layerfold.errors import InputError, check_one_of
from layerfold.evaluators.base import Protocols, Published, Score, encode, end_of_text
from layerfold.evaluators.classification.logistic import BagOfWords, fit
from layerfold.maths.intervals import difference_of_shares, wilson
from layerfold.progress import SILENT, Progress
from layerfold.settings import check_least
from layerfold.text.corpora import Corpus
from layerfold.text.examples import Label, Labelled, load_labelled

_RATE_AT_WIDTH = 0.0576
"""The default learning rate times d_model: 3e-4 at pocket's 192, 7.5e-5 at GPT-2's 768."""
_CONTEXT, _PUBLISHED_CONTEXT = 256, 128
_PUBLISHED: dict[str, Any] = {
    **{"body": True, "train_rows": None, "test_rows": None, "context": None, "keep": "first"},
    **{"learning_rate": 5e-5, "epochs": 2, "batch_size": 2},
}

Keep = Literal["first", "last"]
Side = Literal["left", "right"]
Pool = Literal["last_token", "last_position"]


def versus(score: dict[str, Any], base: dict[str, Any]) -> dict[str, float] | None:
    """Accuracy less the base's, with its 95 % interval, paired over the texts that both read.

    None where they read different texts, or different parts of them, as where a loaded model has a shorter context.
    """
    if any(score.get(key) != base.get(key) for key in ("test_sha256", "context")):
        return None
    own, others = np.array(score["right"]), np.array(base["right"])
    return difference_of_shares(int((own > others).sum()), int((own < others).sum()), len(own)).to_json()


@dataclass(frozen=True)
class Imdb(Published):
    """Accuracy on test texts of a linear head on the last real token, with its 95 % Wilson interval.

    The head is trained the same way for every model: together with the body, or alone, by logistic regression on the
    body's hidden states. Test texts are scored once, and choose nothing.

    Attributes:
        data: see `examples`; None takes ``imdb`` for pocket, which was trained on it, else ``stanfordnlp/imdb``.
        body: whether the body is trained too, not the head alone.
        train_rows: number of texts of the ``train`` split, drawn by the seed; None takes all.
        test_rows: number of texts of the ``test`` split, the same for every seed; None takes all.
        context: maximum number of tokens read of a text; None takes the model's maximum, 256 at most.
        keep: end of a longer text that is read.
        learning_rate: highest learning rate of the training with the body; None takes 0.0576 / d_model.
        epochs, batch_size: length and batch size of the training with the body.
        eval_batch_size, padding: batch size and padding side of test texts; change no figure.
        seed: seed of the choice and order of training texts and of the head's first weights; None takes the recipe's.
        protocol: ``published`` repeats the published run instead: all texts cut after 128 tokens and padded to that,
            head and body trained over two epochs in batches of 2 at 5e-5.
        pool: ``last_token``, or ``last_position`` as in the published run of pruned_104M, which is padding where a text
            is short.
    """

    data: str | None = None
    body: bool = True
    train_rows: int | None = 1024
    test_rows: int | None = 1000
    context: int | None = None
    keep: Keep = "last"
    learning_rate: float | None = None
    epochs: int = 1
    batch_size: int = 16
    eval_batch_size: int = 32
    padding: Side = "right"
    seed: int | None = None
    protocol: Protocols = "sound"
    pool: Pool = "last_token"
    name: ClassVar[str] = "imdb"
    task: ClassVar[str] = "classification"
    cost: ClassVar[float] = 12.0
    baseline_labels: ClassVar[tuple[str, ...]] = ("bag of words",)

    versus = staticmethod(versus)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, "imdb", epochs=1, batch_size=1, eval_batch_size=1, train_rows=2, test_rows=1, context=1)
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            raise InputError(f"imdb learning_rate {self.learning_rate}; accepted: above 0, below 1")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise InputError(f"imdb seed {self.seed}; accepted: 0 ... {2**32 - 1}")
        for name, accepted in (("keep", Keep), ("padding", Side), ("pool", Pool)):
            check_one_of(f"imdb {name}", getattr(self, name), get_args(accepted))
        if self.pool == "last_position" and not self.published:
            raise InputError("imdb pool 'last_position' reads padding; accepted: with protocol published")

    def default_data(self, base: Model) -> str:
        """Return the name of the default texts for a base."""
        return "imdb" if is_pocket(base) else "stanfordnlp/imdb"

    def settings(self, model: Model) -> dict[str, Any]:
        """Return what determines the figure besides the model."""
        train, test = self._chosen(model)
        settings = {
            "protocol": self.protocol,
            "data": train.name,
            "train_rows": len(train.texts),
            "test_rows": len(test.texts),
            "train_sha256": train.sha256,
            "test_sha256": test.sha256,
            "body": self._used.body,
            "context": self._context(model),
            "keep": self._used.keep,
            "seed": self._seed,
        }
        if self._used.body:
            settings |= self._training(model)
        return settings | ({"pool": self.pool} if self.published else {})

    def __call__(self, model: Model, progress: Progress = SILENT) -> Score:
        """Train a classifier on a copy of the model, and measure its accuracy."""
        # Imported when needed: transformers' Trainer takes seconds.
        from layerfold.evaluators.classification import classifier

        train, test = self._chosen(model)
        classes, labels = _classes(train)
        with progress.doing("classification, reading texts"):
            rows, cut_train = self._encode(model, train.texts)
            test_rows, cut_test = self._encode(model, test.texts)
        padding, test_padding = classifier.Padding(), classifier.Padding(self.padding)
        if self.published:
            end = end_of_text(model)
            model.decoder.check_ids(torch.tensor([end]))
            pooled = self.pool == "last_position"
            padding = test_padding = classifier.Padding("right", self._context(model), pooled, end)
        if self._used.body:
            training = classifier.Training(**self._training(model), seed=self._seed)
            trained = classifier.train(model.decoder, rows, labels, len(classes), training, padding, progress)
        else:
            trained = classifier.fit_head(
                model.decoder, rows, labels, len(classes), padding, self.eval_batch_size, progress
            )
        predicted = classifier.predict(trained, test_rows, test_padding, self.eval_batch_size, progress)
        details = {
            **self.settings(model),
            "classes": classes,
            "truncated_train": cut_train,
            "truncated_test": cut_test,
            "duplicates_dropped": train.dropped + test.dropped,
        }
        return _score(predicted, test, details)

    def baselines(self, base: Model, progress: Progress = SILENT) -> dict[str, Score]:
        """Measure logistic regression on the words of the same training texts."""
        train, test = self._chosen(base)
        with progress.doing("classification, bag of words"):
            classes, labels = _classes(train)
            bag = BagOfWords(train.texts)
            fitted = fit(bag(train.texts), np.array(labels), len(classes))
            predicted = fitted.predict(bag(test.texts)).tolist()
        details = {**self.settings(base), "ridge": fitted.ridge, "classes": classes}
        return {"bag of words": _score(predicted, test, details)}

    def held_out(self, base: Model) -> Corpus:
        """Return the whole test split."""
        return self._read(base)[1].corpus

    @cached_property
    def _used(self) -> Imdb:
        """These settings, or those of the published run."""
        return replace(self, **_PUBLISHED) if self.published else self

    @property
    def _seed(self) -> int:
        return self.seed or 0

    def _training(self, model: Model) -> dict[str, Any]:
        rate = self._used.learning_rate or _RATE_AT_WIDTH / model.decoder.d_model
        return {"learning_rate": rate, "epochs": self._used.epochs, "batch_size": self._used.batch_size}

    def _context(self, model: Model) -> int:
        context, longest = self._used.context, model.decoder.context
        if context is not None and context > longest:
            raise InputError(f"imdb context {context}; accepted: 1 ... {longest} (the model's maximum)")
        return context or min(_PUBLISHED_CONTEXT if self.published else _CONTEXT, longest)

    def _read(self, model: Model) -> tuple[Labelled, Labelled]:
        name = self.data or self.default_data(model)
        return self._once(name, lambda: load_labelled(name))

    def _chosen(self, model: Model) -> tuple[Labelled, Labelled]:
        """The texts for training and for the test."""
        train, test = self._read(model)
        chosen = train.drawn(self._used.train_rows, self._seed)
        missing = set(train.labels) - set(chosen.labels)
        if missing:
            which = sorted(map(str, missing))[0]
            raise InputError(f"imdb train_rows {self.train_rows}; accepted: more, since none has label {which!r}")
        return chosen, test.drawn(self._used.test_rows, 0)

    def _encode(self, model: Model, texts: tuple[str, ...]) -> tuple[list[list[int]], int]:
        """Token ids of each text, cut to the context, and the number of texts that were cut."""
        longest, rows = self._context(model), encode(model, texts)
        if not all(rows):
            raise InputError(f"the tokenizer finds no token in the text {texts[rows.index([])][:40]!r}")
        model.decoder.check_ids(torch.tensor([max(row) for row in rows]))
        first = self._used.keep == "first"
        return [row[:longest] if first else row[-longest:] for row in rows], sum(len(row) > longest for row in rows)


def _classes(train: Labelled) -> tuple[list[Label], list[int]]:
    """The distinct labels, in an order that does not depend on the texts', and the class index of each text."""
    classes = sorted(set(train.labels), key=lambda label: (str(type(label)), label))
    return classes, [classes.index(label) for label in train.labels]


def _score(predicted: list[int], test: Labelled, details: dict[str, Any]) -> Score:
    classes = details["classes"]
    right = [int(classes[index] == label) for index, label in zip(predicted, test.labels, strict=True)]
    largest = max(Counter(test.labels).values()) / len(test.labels)
    details = {**details, "largest_class": largest, "right": right}
    return Score.of(wilson(sum(right), len(right)), "accuracy", details, lower_is_better=False)
