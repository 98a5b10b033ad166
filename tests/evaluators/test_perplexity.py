from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import CONTEXT, prose, tiny, tokenizer
from torch.nn import functional

from layerfold.checkpoint.model import Model
from layerfold.evaluators import Perplexity
from layerfold.evaluators.perplexity import versus
from layerfold.inference import scoring
from layerfold.maths.intervals import ratio_interval
from layerfold.memory import room
from layerfold.methods import Merge


@torch.no_grad()
def plain_loop(model: Model, folder: str, context: int, stride: int, limit: int | None = None) -> tuple[float, int]:
    """Perplexity and scored tokens by the straightforward loop, from the text file on."""
    ids: list[int] = []
    for document in (Path(folder) / "test.txt").read_text().replace("\n\n", "\n\0").split("\0"):
        ids += [tokenizer().eos_token_id] * bool(ids) + tokenizer()(document)["input_ids"]
    ids = ids[:limit]
    nats, scored, reached = 0.0, 0, 0
    for start in range(0, len(ids), stride):
        window = torch.tensor(ids[start : start + context])
        first = max(1, reached - start)  # position 0 has nothing before it, and some were scored before
        if first < len(window):
            logits = model.decoder.model(input_ids=window[None]).logits[0]
            nats += functional.cross_entropy(logits[first - 1 : -1], window[first:], reduction="sum").item()
            scored += len(window) - first
        reached = start + len(window)
    return math.exp(nats / scored), scored


@pytest.mark.parametrize(
    ("context", "stride", "limit"), [(CONTEXT, CONTEXT, 101), (CONTEXT, 10, 230), (17, 17, 230), (17, 5, 101)]
)
@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_perplexity_equals_a_plain_transformers_loop(
    family: str, context: int, stride: int, limit: int, corpus_folder: str
) -> None:
    model = tiny(family)
    expected, tokens = plain_loop(model, corpus_folder, context, stride, limit)
    evaluator = Perplexity(corpus=corpus_folder, context=context, stride=stride, limit_tokens=limit)
    assert evaluator.windows(model).lengths[-1] < context
    score = evaluator(model)
    assert score.value == pytest.approx(expected, rel=1e-4)
    assert score.details["tokens"] == tokens
    assert score.low < score.value < score.high


def test_the_defaults_are_disjoint_windows_of_the_models_context_with_an_interval_over_documents(
    corpus_folder: str,
) -> None:
    model = tiny("gpt2")
    score = Perplexity(corpus=corpus_folder)(model)
    details = score.to_json()
    assert (details["context"], details["stride"]) == (CONTEXT, CONTEXT)
    assert score.value == pytest.approx(plain_loop(model, corpus_folder, CONTEXT, CONTEXT)[0], rel=1e-4)
    assert (score.unit, score.lower_is_better) == ("perplexity", True)
    assert versus(details, details) == {"value": 1.0, "low": 1.0, "high": 1.0}, "a model is as good as itself"
    assert Perplexity().protocol_id == "perplexity-2"
    assert (details["documents"], details["interval_over"], len(details["unit_nats"])) == (6, "documents", 6)
    assert sum(details["unit_tokens"]) == details["tokens"]
    nats, tokens = np.array(details["unit_nats"]), np.array(details["unit_tokens"], dtype=float)
    assert score.value == math.exp(nats.sum() / tokens.sum())
    found = ratio_interval(nats, tokens).map(math.exp)
    assert (score.low, score.high) == (found.low, found.high)


def test_neither_batch_nor_logit_piece_size_changes_the_result(
    corpus_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, evaluator = tiny("llama"), Perplexity(corpus=corpus_folder, stride=20)
    expected = evaluator(model)
    for batch_tokens, logit_bytes in ((1, 1), (1, 1 << 30), (100, 4 * 300 * 7), (1 << 20, 1), (1 << 20, 1 << 30)):
        monkeypatch.setattr(room, "CPU_TOKENS", batch_tokens)
        monkeypatch.setattr(scoring, "_LOGIT_BYTES", logit_bytes)
        score = evaluator(model)
        assert score.details["unit_nats"] == pytest.approx(expected.details["unit_nats"], rel=1e-5)
        assert score.value == pytest.approx(expected.value, rel=1e-5)


def test_bits_per_byte_divide_all_nats_by_all_bytes(corpus_folder: str) -> None:
    model, evaluator = tiny("gpt2"), Perplexity(corpus=corpus_folder, stride=8)
    details = evaluator(model).details
    text = (Path(corpus_folder) / "test.txt").read_text()
    first = tokenizer()(text, return_offsets_mapping=True)["offset_mapping"][0]
    # All but the text's first token are scored; the five blank lines between documents are no part of them.
    scored = len(text.encode()) - 5 - len(text[slice(*first)].encode())
    assert details["bits_per_byte"] == pytest.approx(sum(details["unit_nats"]) / math.log(2) / scored, rel=1e-9)


@torch.no_grad()
def published(model: Model, folder: str) -> float:
    """MEASURING.md's row on the published table, word by word."""
    text = (Path(folder) / "test.txt").read_text()
    lines = [line for line in text.split("\n") if line.strip()][:200]
    padded_tokenizer = tokenizer().__class__(
        tokenizer_object=tokenizer().backend_tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    total, count = 0.0, 0
    for first in range(0, len(lines), 2):
        batch = padded_tokenizer(
            lines[first : first + 2],
            padding="longest",
            truncation=True,
            max_length=min(128, CONTEXT),
            return_tensors="pt",
        )
        logits = model.decoder.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.input_ids[:, 1:].flatten())
        total += loss.item() * batch.input_ids.numel()
        count += batch.input_ids.numel()
    return math.exp(total / count)


@pytest.mark.parametrize(("family", "lines"), [("gpt2", 230), ("llama", 7)])
def test_the_published_protocol_is_the_published_code(family: str, lines: int, write: Any) -> None:
    # A document a few lines long, lines shorter and longer than what is kept of them, more lines than are read.
    text = "\n".join(prose(3 + seed % 17, seed) + ("\n" if seed % 5 == 4 else "") for seed in range(lines))
    folder = str(write("published/test.txt", text).parent)
    model = tiny(family)
    score = Perplexity(corpus=folder, protocol="published")(model)
    assert score.value == pytest.approx(published(model, folder), rel=1e-4)
    assert score.details["bits_per_byte"] is None
    assert Perplexity(corpus=folder)(model).value != pytest.approx(score.value, rel=1e-2)


def test_a_comparison_is_the_ratio_and_paired(corpus_folder: str) -> None:
    model, evaluator = tiny("gpt2"), Perplexity(corpus=corpus_folder)
    other = model.copy()
    Merge(n=2, align="none").apply(other.decoder, None)
    base, score = evaluator(model).to_json(), evaluator(other).to_json()
    ratio = versus(score, base)
    assert ratio is not None
    assert ratio["value"] == pytest.approx(score["value"] / base["value"])
    assert ratio["low"] < ratio["value"] < ratio["high"]
    # Paired: narrower than two intervals taken independently.
    assert ratio["high"] / ratio["low"] < score["high"] / score["low"] * base["high"] / base["low"]


def test_a_text_of_one_document_has_the_interval_of_its_windows(write: Any) -> None:
    folder = str(write("one/test.txt", prose(60)).parent)
    score = Perplexity(corpus=folder)(tiny("gpt2")).to_json()
    assert (score["documents"], score["interval_over"]) == (1, "windows of one document")
    assert len(score["unit_nats"]) > 2
    assert score["low"] < score["value"] < score["high"]


def test_scores_of_an_earlier_protocol_or_of_other_windows_are_not_compared(corpus_folder: str) -> None:
    score, other = (Perplexity(corpus=corpus_folder, stride=s)(tiny("gpt2")).to_json() for s in (CONTEXT, 7))
    old = {key.replace("unit_", "window_"): value for key, value in score.items()}
    assert versus(score, old) is versus(old, score) is versus(old, old) is versus(score, other) is None
