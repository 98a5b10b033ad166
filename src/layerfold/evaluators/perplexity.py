"""Perplexity over windows of a corpus, each token scored once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from layerfold.checkpoint.model import Model, default_corpus
from layerfold.errors import CorpusError, InputError
from layerfold.evaluators.base import Protocols, Published, Score, end_of_text
from layerfold.inference.scoring import unit_nats
from layerfold.maths.intervals import Floats, exponential, ratio_interval
from layerfold.progress import SILENT, Progress
from layerfold.text.corpora import Corpus, load_corpus
from layerfold.text.windows import TokenWindows, cut_windows

_PUBLISHED_LINES, _PUBLISHED_BATCH, _PUBLISHED_TOKENS = 200, 2, 128


def versus(score: dict[str, Any], base: dict[str, Any]) -> dict[str, float] | None:
    """Perplexity divided by the base's, with the 95 % interval of the differences on the documents that they share.

    None where the two were measured on different documents, or one by an earlier protocol.
    """
    tokens = score.get("unit_tokens")
    if tokens is None or any(score.get(key) != base.get(key) for key in ("tokens_sha256", "unit_tokens")):
        return None
    difference = np.array(score["unit_nats"]) - np.array(base["unit_nats"])
    return ratio_interval(difference, np.array(tokens, dtype=np.float64)).map(exponential).to_json()


@dataclass(frozen=True)
class Perplexity(Published):
    """exp(nats / scored tokens), with a 95 % interval over documents.

    The interval estimates how far the figure may be from that of many more documents of the same kind. For a text of
    one document it is over the document's windows, and does not cover other documents.

    Attributes:
        corpus: see `corpora`; None takes the model's default.
        split: ``test`` by default.
        context: window length in tokens; None takes the model's maximum, 2,048 at most.
        stride: step from window to window, in tokens or, below 1, as a fraction of `context`; None takes `context`.
        limit_tokens: maximum number of scored tokens; None scores the whole split.
        protocol: ``published`` repeats the published measurement instead: the first 200 non-empty lines, cut at 128
            tokens, in batches of two padded with end-of-text, the padding scored.
    """

    corpus: str | None = None
    split: str = "test"
    context: int | None = None
    stride: int | float | None = None
    limit_tokens: int | None = None
    protocol: Protocols = "sound"
    name: ClassVar[str] = "perplexity"
    task: ClassVar[str] = name
    before_recovery: ClassVar[bool] = True

    versus = staticmethod(versus)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.stride, float) and not 0 < self.stride < 1:
            raise InputError(f"perplexity stride {self.stride}; accepted: whole tokens, or a fraction of the context")

    def settings(self, model: Model) -> dict[str, Any]:
        """Return what determines the figure besides the model."""
        corpus = self.read(model)
        text = {
            "protocol": self.protocol,
            "corpus": corpus.name,
            "split": corpus.split,
            "corpus_sha256": corpus.sha256,
        }
        if self.published:
            return text
        windows = self.windows(model)
        return text | {"context": windows.context, "stride": windows.stride, "tokens_sha256": windows.sha256}

    def scored_text(self, model: Model, score: Score) -> str:
        """Say what share of the corpus the split is, and how many of its documents `limit_tokens` admitted."""
        read, scored = self.read(model), score.details.get("documents", 0)
        limited = scored < len(read.documents) and self.limit_tokens is not None
        return read.share + (f"; {scored:,} of them scored" if limited else "")

    def __call__(self, model: Model, progress: Progress = SILENT) -> Score:
        """Measure one model."""
        settings = self.settings(model)
        if self.published:
            nats, tokens = self._published_nats(model, progress)
            described: dict[str, Any] = {"bits_per_byte": None, "interval_over": "batches"}
        else:
            windows = self.windows(model)
            nats = unit_nats(model.decoder, windows, progress, "perplexity, windows")
            tokens = windows.units.tokens
            described = {
                "bits_per_byte": nats.sum() / math.log(2) / windows.bytes if windows.bytes else None,
                "documents": windows.units.documents,
                "interval_over": windows.units.kind,
            }
        details = {
            "tokens": int(tokens.sum()),
            **described,
            **settings,
            "unit_nats": nats.tolist(),
            "unit_tokens": tokens.astype(int).tolist(),
        }
        interval = ratio_interval(nats, tokens).map(exponential)
        return Score.of(interval, "perplexity", details, lower_is_better=True)

    def read(self, model: Model) -> Corpus:
        """Return the corpus, read once."""
        name = self.corpus or default_corpus(model)
        return self._once(name, lambda: load_corpus(name, self.split))

    held_out = read

    def windows(self, model: Model) -> TokenWindows:
        """Return the windows for this model's tokenizer and context, cut once."""
        tokenizer = model.require_tokenizer()
        context = model.decoder.default_context if self.context is None else self.context
        if context > model.decoder.context:
            raise InputError(f"context {context}; accepted: 2 ... {model.decoder.context} (the model's maximum)")
        stride = max(1, round(self.stride * context)) if isinstance(self.stride, float) else self.stride
        options: dict[str, Any] = {"context": context, "stride": stride, "limit_tokens": self.limit_tokens}
        # Under the tokenizer itself, which lives as long as the key: another could take over its id.
        return self._once((tokenizer, context), lambda: cut_windows(self.read(model), tokenizer, **options))

    @torch.no_grad()
    def _published_nats(self, model: Model, progress: Progress) -> tuple[Floats, Floats]:
        """Nats and tokens of each batch, padding included in both, as the published notebooks count them."""
        tokenizer, padding = model.require_tokenizer(), end_of_text(model)
        lines = [line for document in self.read(model).documents for line in document.split("\n") if line.strip()]
        if not lines:
            raise CorpusError(f"corpus {self.corpus!r} has no line to score")
        lines = lines[:_PUBLISHED_LINES]
        nats, tokens = [], []
        for first in progress.track(range(0, len(lines), _PUBLISHED_BATCH), "published perplexity, batches"):
            rows = [
                tokenizer(line, truncation=True, max_length=min(_PUBLISHED_TOKENS, model.decoder.context))["input_ids"]
                for line in lines[first : first + _PUBLISHED_BATCH]
            ]
            width = max(2, *map(len, rows))
            ids = torch.full((len(rows), width), padding)
            mask = torch.zeros_like(ids)
            for i, row in enumerate(rows):
                ids[i, : len(row)] = torch.tensor(row)
                mask[i, : len(row)] = 1
            model.decoder.check_ids(ids)
            ids, mask = ids.to(model.decoder.device), mask.to(model.decoder.device)
            loss = model.decoder.model(input_ids=ids, attention_mask=mask, labels=ids).loss
            nats.append(loss.item() * ids.numel())
            tokens.append(ids.numel())
        return np.array(nats), np.array(tokens, dtype=np.float64)
