"""Summaries that a model writes, compared with summaries that people wrote."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from layerfold.checkpoint.model import Model, is_pocket
from layerfold.errors import InputError, MissingExtraError
from layerfold.evaluators.base import Evaluator, Protocols, Score, check_protocol
from layerfold.inference.decoding import continue_each
from layerfold.maths.intervals import mean_interval
from layerfold.progress import SILENT, Progress
from layerfold.text.corpora import Corpus
from layerfold.text.examples import Summarized, load_summaries
from layerfold.text.words import in_english_letters, sentences, terms

METRICS = ("rouge1", "rouge2", "rougeL")
CUE = "\nTL;DR:"
_LEAD = 3
_SHOWN, _SHOWN_CHARACTERS = 3, 400
_PUBLISHED_TOKENS, _PUBLISHED_NEW, _PUBLISHED_LIMIT = 128, 60, 100
_PUBLISHED_SEARCH = {"num_beams": 3, "early_stopping": True, "no_repeat_ngram_size": 2}

Rater = Callable[[str, str], dict[str, float]]


@dataclass(frozen=True)
class Rouge(Evaluator):
    """ROUGE-1, ROUGE-2 and ROUGE-L F1 by the ``rouge-score`` package, with 95 % intervals over documents.

    English summaries are cut into words by the package, with stemming; those of other languages by `words`, without.

    The prompt is the document, cut so that prompt and summary fit the context, and a cue. The summary is what is
    generated greedily after it, the new tokens alone. One that is empty scores 0. The score's own value is ROUGE-L.

    Attributes:
        data: see `examples`; None takes ``aclsum`` for pocket, else ``cnn_dailymail/3.0.0``.
        split: ``test`` by default.
        limit: the first so many documents; None takes all.
        new_tokens: the longest summary.
        cue: what follows the document.
        batch_size: documents that are generated from at once; changes no figure.
        seed: of the baseline of random sentences; None takes the recipe's.
        protocol: ``published`` repeats the published run instead: the first 100 documents cut after 128 tokens, no
            cue, three beams, 60 new tokens, no pair of tokens twice, and what is scored, without stemming, begins
            with the prompt itself.
    """

    data: str | None = None
    split: str = "test"
    limit: int | None = 100
    new_tokens: int = 64
    cue: str = CUE
    batch_size: int = 16
    seed: int | None = None
    protocol: Protocols = "sound"
    name: ClassVar[str] = "rouge"
    cost: ClassVar[float] = 1.5
    baseline_labels: ClassVar[tuple[str, ...]] = ("lead-3", "random sentences")

    def __post_init__(self) -> None:
        check_protocol(self.protocol)
        for name in ("limit", "new_tokens", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"rouge {name} {getattr(self, name)}; accepted: 1 or more")

    @property
    def protocol_id(self) -> str:
        """Name and version of the protocol."""
        return "summarization-2" if self.protocol == "sound" else "summarization-published-2"

    def default_data(self, base: Model) -> str:
        """Return the documents that fit a base."""
        return "aclsum" if is_pocket(base) else "cnn_dailymail/3.0.0"

    def settings(self, model: Model) -> dict[str, Any]:
        """Return what determines the figure besides the model."""
        pairs = self._pairs(model)
        settings = {
            "protocol": self.protocol,
            "data": pairs.name,
            "split": pairs.split,
            "documents": len(pairs.documents),
            "documents_sha256": pairs.sha256,
            "context": model.decoder.default_context,
        }
        if self.protocol == "published":
            return settings
        return settings | {"new_tokens": self.new_tokens, "cue": self.cue, "stemming": _english(pairs)}

    def __call__(self, model: Model, progress: Progress = SILENT) -> Score:
        """Write a summary of each document and rate it."""
        pairs = self._pairs(model)
        rate = self._rater(pairs)
        tokenizer = model.require_tokenizer()
        prompts, cut = self._prompts(model, pairs.documents)
        published = self.protocol == "published"
        end = tokenizer.eos_token_id
        written: list[str] = [""] * len(prompts)
        # Prompts of like length together: the least padding.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        batches = [order[first : first + self.batch_size] for first in range(0, len(order), self.batch_size)]
        for chosen in progress.track(batches, "summarizing, batches"):
            new = continue_each(
                model.decoder,
                [prompts[i] for i in chosen],
                self._new_tokens(model),
                end,
                **(_PUBLISHED_SEARCH if published else {}),
            )
            for i, tokens in zip(chosen, new, strict=True):
                shown = [*prompts[i], *tokens] if published else tokens
                written[i] = str(tokenizer.decode(shown, skip_special_tokens=True))
        return self._score(model, written, rate, {"truncated": cut})

    def baselines(self, base: Model, progress: Progress = SILENT) -> dict[str, Score]:
        """Return what needs no model: each document's first three sentences, and three drawn at random."""
        pairs = self._pairs(base)
        rate = self._rater(pairs)
        drawn = random.Random(self.seed or 0)
        lead, chosen = [], []
        for document in pairs.documents:
            parts = sentences(document)
            lead.append(" ".join(parts[:_LEAD]))
            chosen.append(" ".join(drawn.sample(parts, min(_LEAD, len(parts)))))
        with progress.doing("summarizing, baselines"):
            found = {"lead-3": lead, "random sentences": chosen}
            return {label: self._score(base, texts, rate, {}) for label, texts in found.items()}

    def held_out(self, base: Model) -> Corpus:
        """Return the documents that are summarized, and make sure at this early time that summaries can be rated."""
        pairs = self._pairs(base)
        self._rater(pairs)
        return pairs.corpus

    def _score(self, model: Model, written: Sequence[str], rate: Rater, found: dict[str, Any]) -> Score:
        pairs = self._pairs(model)
        rated = [rate(summary, text) for summary, text in zip(pairs.summaries, written, strict=True)]
        each = {metric: [one[metric] for one in rated] for metric in METRICS}
        intervals = {
            metric: mean_interval(np.array(values, dtype=np.float64)).within(0, 1) for metric, values in each.items()
        }
        details = {
            **self.settings(model),
            **found,
            "empty": sum(not text.strip() for text in written),
            **{metric: interval.to_json() for metric, interval in intervals.items()},
            "each": each,
            "summaries": [
                {"document": document[:_SHOWN_CHARACTERS], "summary": summary, "text": text}
                for document, summary, text in zip(pairs.documents, pairs.summaries, written, strict=True)
            ][:_SHOWN],
        }
        whole = intervals["rougeL"]
        return Score(whole.value, whole.low, whole.high, "ROUGE-L", lower_is_better=False, details=details)

    def _prompts(self, model: Model, documents: Sequence[str]) -> tuple[list[list[int]], int]:
        """Token ids to continue, and how many documents had to be cut."""
        tokenizer = model.require_tokenizer()
        settings: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
        cue: list[int] = []
        if self.cue and self.protocol == "sound":
            cue = tokenizer(self.cue, **settings)["input_ids"]
        room = model.decoder.default_context - self._new_tokens(model) - len(cue)
        if self.protocol == "published":
            room = min(_PUBLISHED_TOKENS, room)
        if room < 1:
            raise InputError(
                f"rouge new_tokens {self._new_tokens(model)}; accepted: less than the context, "
                f"{model.decoder.default_context}, less the cue's {len(cue)} tokens"
            )
        rows: list[list[int]] = tokenizer(list(documents), **settings)["input_ids"]
        return [[*row[:room], *cue] for row in rows], sum(len(row) > room for row in rows)

    def _new_tokens(self, model: Model) -> int:
        if self.protocol == "published":
            return min(_PUBLISHED_NEW, model.decoder.default_context // 2)
        return self.new_tokens

    def _rater(self, pairs: Summarized) -> Rater:
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError as error:
            raise MissingExtraError("rouge-score", "rouge") from error
        words = {} if _english(pairs) else {"tokenizer": _Words()}
        scorer = RougeScorer(list(METRICS), use_stemmer=self.protocol != "published", **words)
        return lambda summary, text: {
            metric: float(found.fmeasure) for metric, found in scorer.score(summary, text).items()
        }

    @cached_property
    def _found(self) -> dict[str, Summarized]:
        return {}

    def _pairs(self, model: Model) -> Summarized:
        name = self.data or self.default_data(model)
        if name not in self._found:
            read = load_summaries(name, self.split)
            limit = _PUBLISHED_LIMIT if self.protocol == "published" else self.limit
            self._found[name] = Summarized(name, self.split, read.documents[:limit], read.summaries[:limit])
        return self._found[name]


def _english(pairs: Summarized) -> bool:
    return in_english_letters(pairs.summaries)


class _Words:
    """What the package takes for a tokenizer: words of any script, none of them stemmed."""

    def tokenize(self, text: str) -> list[str]:
        """Return the words in order."""
        return terms(text)
