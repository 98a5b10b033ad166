"""ROUGE: summaries that a model generates, compared with reference summaries."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from layerfold.checkpoint.model import Model, is_pocket
from layerfold.errors import InputError, MissingExtraError
from layerfold.evaluators.base import Protocols, Published, Score, batches_by_length, encode
from layerfold.inference.decoding import continue_each
from layerfold.maths.intervals import mean_interval
from layerfold.progress import SILENT, Progress
from layerfold.settings import check_least
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
class Rouge(Published):
    """ROUGE-1, ROUGE-2 and ROUGE-L F1 by the ``rouge-score`` package, with 95 % intervals over documents.

    The package cuts English summaries into words, with stemming; `words` cuts those of other languages, without.

    The prompt is the document, cut so that prompt and summary fit the context, and a cue. The summary is the greedy
    continuation without the prompt. An empty one scores 0. The score's own value is ROUGE-L.

    Attributes:
        data: see `examples`; None takes ``aclsum`` for pocket, else ``cnn_dailymail/3.0.0``.
        split: ``test`` by default.
        limit: number of documents, the first ones; None takes all.
        new_tokens: maximum length of a summary.
        cue: text after the document.
        batch_size: documents in a batch; changes no figure.
        seed: seed of the baseline of random sentences; None takes the recipe's.
        protocol: ``published`` repeats the published run instead: the first 100 documents cut after 128 tokens, no
            cue, three beams, 60 new tokens, no pair of tokens twice; the scored text, without stemming, includes the
            prompt.
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
    task: ClassVar[str] = "summarization"
    cost: ClassVar[float] = 1.5
    baseline_labels: ClassVar[tuple[str, ...]] = ("lead-3", "random sentences")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, "rouge", limit=1, new_tokens=1, batch_size=1)

    def default_data(self, base: Model) -> str:
        """Return the name of the default documents for a base."""
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
        if self.published:
            return settings
        return settings | {"new_tokens": self.new_tokens, "cue": self.cue, "stemming": _english(pairs)}

    def __call__(self, model: Model, progress: Progress = SILENT) -> Score:
        """Generate a summary of each document and rate it."""
        pairs = self._pairs(model)
        rate = self._rater(pairs)
        tokenizer, new_tokens = model.require_tokenizer(), self._new_tokens(model)
        prompts, cut = self._prompts(model, pairs.documents)
        search = _PUBLISHED_SEARCH if self.published else {}
        written: list[str] = [""] * len(prompts)
        for batch in progress.track(batches_by_length(prompts, self.batch_size), "summarizing, batches"):
            batch_prompts = [prompts[i] for i in batch]
            new = continue_each(model.decoder, batch_prompts, new_tokens, tokenizer.eos_token_id, **search)
            for i, tokens in zip(batch, new, strict=True):
                scored = [*prompts[i], *tokens] if self.published else tokens
                written[i] = str(tokenizer.decode(scored, skip_special_tokens=True))
        return self._score(model, written, rate, {"truncated": cut})

    def baselines(self, base: Model, progress: Progress = SILENT) -> dict[str, Score]:
        """Rate each document's first three sentences, and three drawn at random."""
        pairs = self._pairs(base)
        rate = self._rater(pairs)
        drawn = random.Random(self.seed or 0)
        lead, chosen = [], []
        for document in pairs.documents:
            parts = sentences(document)
            lead.append(" ".join(parts[:_LEAD]))
            chosen.append(" ".join(drawn.sample(parts, min(_LEAD, len(parts)))))
        with progress.doing("summarizing, baselines"):
            texts = dict(zip(self.baseline_labels, (lead, chosen), strict=True))
            return {label: self._score(base, written, rate, {}) for label, written in texts.items()}

    def held_out(self, base: Model) -> Corpus:
        """Return the documents; fails here, early, where the package that rates summaries is missing."""
        pairs = self._pairs(base)
        self._rater(pairs)
        return pairs.corpus

    def _score(self, model: Model, written: Sequence[str], rate: Rater, more: dict[str, Any]) -> Score:
        pairs = self._pairs(model)
        rated = [rate(summary, text) for summary, text in zip(pairs.summaries, written, strict=True)]
        figures = {metric: [rating[metric] for rating in rated] for metric in METRICS}
        intervals = {
            metric: mean_interval(np.array(values, dtype=np.float64)).within(0, 1) for metric, values in figures.items()
        }
        details = {
            **self.settings(model),
            **more,
            "empty": sum(not text.strip() for text in written),
            **{metric: interval.to_json() for metric, interval in intervals.items()},
            "each": figures,
            "summaries": [
                {"document": document[:_SHOWN_CHARACTERS], "summary": summary, "text": text}
                for document, summary, text in zip(pairs.documents, pairs.summaries, written, strict=True)
            ][:_SHOWN],
        }
        return Score.of(intervals["rougeL"], "ROUGE-L", details, lower_is_better=False)

    def _prompts(self, model: Model, documents: Sequence[str]) -> tuple[list[list[int]], int]:
        """Token ids of each prompt, and the number of documents that were cut."""
        cue = encode(model, [self.cue])[0] if self.cue and not self.published else []
        room = model.decoder.default_context - self._new_tokens(model) - len(cue)
        if self.published:
            room = min(_PUBLISHED_TOKENS, room)
        if room < 1:
            raise InputError(
                f"rouge new_tokens {self._new_tokens(model)}; accepted: less than the context, "
                f"{model.decoder.default_context}, less the cue's {len(cue)} tokens"
            )
        rows = encode(model, documents)
        return [[*row[:room], *cue] for row in rows], sum(len(row) > room for row in rows)

    def _new_tokens(self, model: Model) -> int:
        return min(_PUBLISHED_NEW, model.decoder.default_context // 2) if self.published else self.new_tokens

    def _rater(self, pairs: Summarized) -> Rater:
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError as error:
            raise MissingExtraError("rouge-score", "rouge") from error
        words = {} if _english(pairs) else {"tokenizer": _Words()}
        scorer = RougeScorer(list(METRICS), use_stemmer=not self.published, **words)
        return lambda summary, text: {
            metric: float(rating.fmeasure) for metric, rating in scorer.score(summary, text).items()
        }

    def _pairs(self, model: Model) -> Summarized:
        name = self.data or self.default_data(model)
        limit = _PUBLISHED_LIMIT if self.published else self.limit
        return self._once(name, lambda: load_summaries(name, self.split).first(limit))


def _english(pairs: Summarized) -> bool:
    return in_english_letters(pairs.summaries)


class _Words:
    """A tokenizer for the package: words of any script, without stemming."""

    def tokenize(self, text: str) -> list[str]:
        """Return the words in order."""
        return terms(text)
