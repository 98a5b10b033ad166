"""Accuracy of a classifier that is made of a model: IMDb's reviews, or any labelled texts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from layerfold.checkpoint.model import Model, is_pocket
from layerfold.errors import InputError, one_of
from layerfold.evaluators.base import Evaluator, Protocols, Score, check_protocol
from layerfold.evaluators.classification.logistic import BagOfWords, fit
from layerfold.maths.intervals import difference_of_shares, wilson
from layerfold.progress import SILENT, Progress
from layerfold.text.corpora import Corpus
from layerfold.text.examples import Label, Labelled, load_labelled

_RATE_AT_WIDTH = 0.0576
"""The default learning rate times d_model: 3e-4 at pocket's 192, 7.5e-5 at GPT-2's 768."""
_CONTEXT = 256
_PUBLISHED_TOKENS = 128

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Imdb(Evaluator):
    """Share of test texts that a linear head on the last real token labels rightly, with its 95 % Wilson interval.

    The head is trained the same way for every model, with the body or, by logistic regression on what the body makes
    of the texts, alone. Test texts are scored once, and nothing is chosen by them.

    Attributes:
        data: see `examples`; None takes ``imdb`` for pocket, which was trained on it, else ``stanfordnlp/imdb``.
        body: whether the whole model is trained, not the head alone.
        train_rows: how many texts of the ``train`` split, drawn by the seed; None takes all.
        test_rows: how many of the ``test`` split, always the same ones; None takes all.
        context: tokens of a text that are read; None takes the model's maximum, 256 at most.
        keep: which end of a text that is longer is read.
        learning_rate: the highest, with the body; None takes 0.0576 / d_model.
        epochs, batch_size: of the training with the body.
        eval_batch_size, padding: how test texts are run; change no figure.
        seed: draws and orders the training texts, and the head's first weights; None takes the recipe's.
        protocol: ``published`` repeats the published run instead: all texts cut after 128 tokens and padded to that,
            head and body trained over two epochs in batches of 2 at 5e-5.
        pool: ``last_token``, or ``last_position`` as the published run of pruned_104M had it, which is padding where a
            text is short.
    """

    data: str | None = None
    body: bool = True
    train_rows: int | None = 1024
    test_rows: int | None = 1000
    context: int | None = None
    keep: Literal["first", "last"] = "last"
    learning_rate: float | None = None
    epochs: int = 1
    batch_size: int = 16
    eval_batch_size: int = 32
    padding: Side = "right"
    seed: int | None = None
    protocol: Protocols = "sound"
    pool: Literal["last_token", "last_position"] = "last_token"
    name: ClassVar[str] = "imdb"
    cost: ClassVar[float] = 12.0
    baseline_labels: ClassVar[tuple[str, ...]] = ("bag of words",)

    def __post_init__(self) -> None:
        check_protocol(self.protocol)
        for name in ("epochs", "batch_size", "eval_batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"imdb {name} {getattr(self, name)}; accepted: 1 or more")
        for name, least in (("train_rows", 2), ("test_rows", 1), ("context", 1)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise InputError(f"imdb {name} {getattr(self, name)}; accepted: {least} or more")
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            raise InputError(f"imdb learning_rate {self.learning_rate}; accepted: above 0, below 1")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise InputError(f"imdb seed {self.seed}; accepted: 0 ... {2**32 - 1}")
        for name, accepted in (("keep", ("first", "last")), ("padding", ("left", "right"))):
            if getattr(self, name) not in accepted:
                raise InputError(f"imdb {name} {one_of(getattr(self, name), accepted)}")
        if self.pool not in ("last_token", "last_position"):
            raise InputError(f"imdb pool {one_of(self.pool, ('last_token', 'last_position'))}")
        if self.pool == "last_position" and self.protocol != "published":
            raise InputError("imdb pool 'last_position' reads padding; accepted: with protocol published")

    @property
    def protocol_id(self) -> str:
        """Name and version of the protocol."""
        return "classification-2" if self.protocol == "sound" else "classification-published-2"

    def default_data(self, base: Model) -> str:
        """Return the texts that fit a base."""
        return "imdb" if is_pocket(base) else "stanfordnlp/imdb"

    def versus(self, score: dict[str, Any], base: dict[str, Any]) -> dict[str, float] | None:
        """Return accuracy less the base's; see `versus`."""
        return versus(score, base)

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
            "body": self._body,
            "context": self._context(model),
            "keep": "first" if self.protocol == "published" else self.keep,
            "seed": self._seed,
        }
        if self._body:
            rate, epochs, batch_size = self._training(model)
            settings |= {"learning_rate": rate, "epochs": epochs, "batch_size": batch_size}
        return settings | ({"pool": self.pool} if self.protocol == "published" else {})

    def __call__(self, model: Model, progress: Progress = SILENT) -> Score:
        """Train a classifier on a copy of the model and count what it labels rightly."""
        # Imported when needed: transformers' Trainer takes seconds.
        from layerfold.evaluators.classification import classifier

        train, test = self._chosen(model)
        classes = _classes(train)
        labels = [classes.index(label) for label in train.labels]
        with progress.doing("classification, reading texts"):
            rows, cut_train = self._encode(model, train.texts)
            test_rows, cut_test = self._encode(model, test.texts)
        padding, test_padding = classifier.Padding(), classifier.Padding(self.padding)
        if self.protocol == "published":
            end = model.require_tokenizer().eos_token_id
            if end is None:
                raise InputError("the tokenizer has no end-of-text token to pad with")
            model.decoder.check_ids(torch.tensor([end]))
            pooled = self.pool == "last_position"
            padding = test_padding = classifier.Padding("right", self._context(model), pooled, int(end))
        if self._body:
            rate, epochs, batch_size = self._training(model)
            training = classifier.Training(rate, epochs, batch_size, self._seed)
            trained = classifier.train(model.decoder, rows, labels, len(classes), training, padding, progress)
        else:
            trained = classifier.fit_head(
                model.decoder, rows, labels, len(classes), padding, self.eval_batch_size, progress
            )
        predicted = classifier.predict(trained, test_rows, test_padding, self.eval_batch_size, progress)
        right = [classes[found] == label for found, label in zip(predicted, test.labels, strict=True)]
        details = {
            **self.settings(model),
            "classes": classes,
            "truncated_train": cut_train,
            "truncated_test": cut_test,
            "duplicates_dropped": train.dropped + test.dropped,
        }
        return _score(right, test, details)

    def baselines(self, base: Model, progress: Progress = SILENT) -> dict[str, Score]:
        """Return what needs no model: logistic regression on the words of the same training texts."""
        train, test = self._chosen(base)
        with progress.doing("classification, bag of words"):
            classes = _classes(train)
            bag = BagOfWords(train.texts)
            fitted = fit(bag(train.texts), np.array([classes.index(label) for label in train.labels]), len(classes))
            predicted = fitted.predict(bag(test.texts))
        right = [classes[found] == label for found, label in zip(predicted, test.labels, strict=True)]
        details = {**self.settings(base), "ridge": fitted.ridge, "classes": classes}
        return {"bag of words": _score(right, test, details)}

    def held_out(self, base: Model) -> Corpus:
        """Return the test texts, all of the split."""
        return self._read(base)[1].corpus

    @property
    def _body(self) -> bool:
        return self.body or self.protocol == "published"

    @property
    def _seed(self) -> int:
        return self.seed or 0

    def _training(self, model: Model) -> tuple[float, int, int]:
        """Learning rate, epochs and batch size."""
        if self.protocol == "published":
            return 5e-5, 2, 2
        return self.learning_rate or _RATE_AT_WIDTH / model.decoder.d_model, self.epochs, self.batch_size

    def _context(self, model: Model) -> int:
        longest = model.decoder.context
        if self.protocol == "published":
            return min(_PUBLISHED_TOKENS, longest)
        if self.context is not None and self.context > longest:
            raise InputError(f"imdb context {self.context}; accepted: 1 ... {longest} (the model's maximum)")
        return self.context or min(_CONTEXT, longest)

    @cached_property
    def _found(self) -> dict[str, tuple[Labelled, Labelled]]:
        return {}

    def _read(self, model: Model) -> tuple[Labelled, Labelled]:
        name = self.data or self.default_data(model)
        if name not in self._found:
            self._found[name] = load_labelled(name)
        return self._found[name]

    def _chosen(self, model: Model) -> tuple[Labelled, Labelled]:
        """The texts that are trained and tested on."""
        train, test = self._read(model)
        whole = self.protocol == "published"
        chosen = _drawn(train, None if whole else self.train_rows, self._seed)
        missing = set(train.labels) - set(chosen.labels)
        if missing:
            which = sorted(map(str, missing))[0]
            raise InputError(f"imdb train_rows {self.train_rows}; accepted: more, since none has label {which!r}")
        return chosen, _drawn(test, None if whole else self.test_rows, 0)

    def _encode(self, model: Model, texts: tuple[str, ...]) -> tuple[list[list[int]], int]:
        """Token ids of each text, cut to the context, and how many were cut."""
        tokenizer, longest = model.require_tokenizer(), self._context(model)
        rows: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        if not all(rows):
            raise InputError(f"the tokenizer makes no token of the text {texts[rows.index([])][:40]!r}")
        model.decoder.check_ids(torch.tensor([max(row) for row in rows]))
        first = self.protocol == "published" or self.keep == "first"
        return [row[:longest] if first else row[-longest:] for row in rows], sum(len(row) > longest for row in rows)


def _classes(train: Labelled) -> list[Label]:
    """The labels there are, in a fixed order whatever their kinds."""
    return sorted(set(train.labels), key=lambda label: (str(type(label)), label))


def _drawn(rows: Labelled, count: int | None, seed: int) -> Labelled:
    """So many rows in an order drawn by the seed, or all: files are often sorted by label."""
    order = np.random.default_rng(seed).permutation(len(rows.texts))[:count]
    return Labelled(
        rows.name,
        rows.split,
        tuple(rows.texts[i] for i in order),
        tuple(rows.labels[i] for i in order),
        rows.dropped,
    )


def _score(right: list[bool], test: Labelled, details: dict[str, Any]) -> Score:
    found = wilson(sum(right), len(right))
    largest = max(Counter(test.labels).values()) / len(test.labels)
    details = {**details, "largest_class": largest, "right": [int(one) for one in right]}
    return Score(found.value, found.low, found.high, "accuracy", lower_is_better=False, details=details)


def versus(score: dict[str, Any], base: dict[str, Any]) -> dict[str, float] | None:
    """Accuracy less the base's, with its 95 % interval, paired over the texts they share.

    None where the two did not read the same of the same texts, as where a loaded model has a shorter context.
    """
    if any(score.get(key) != base.get(key) for key in ("test_sha256", "context")):
        return None
    own, others = np.array(score["right"]), np.array(base["right"])
    return difference_of_shares(int((own > others).sum()), int((own < others).sum()), len(own)).to_json()
