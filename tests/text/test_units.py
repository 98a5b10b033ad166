"""Tokens by document: what intervals are over."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import corpus, prose, tiny, tokenizer

from layerfold.inference.scoring import scored_positions, unit_nats, window_nats
from layerfold.text import units
from layerfold.text.windows import TokenWindows, cut_windows


def cut(*documents: str, context: int = 8, **changes: int | None) -> TokenWindows:
    return cut_windows(corpus(*documents), tokenizer(), context=context, **changes)  # type: ignore[arg-type]


def owners(documents: list[str]) -> list[int]:
    """Which document each token of the stream is of, end-of-text counted to the document before it."""
    lengths = [len(tokenizer()(document)["input_ids"]) + 1 for document in documents]
    return [number for number, length in enumerate(lengths) for _ in range(length)][:-1]


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=9),
    context=st.integers(2, 20),
    part=st.floats(0, 1),
    limit=st.one_of(st.none(), st.integers(20, 90)),
)
def test_every_scored_token_is_counted_to_its_document(
    lengths: list[int], context: int, part: float, limit: int | None
) -> None:
    documents = ["".join(chr(33 + i) for i in range(length)) for length in lengths]
    owner = owners(documents)[:limit]
    if len(owner) < min(context, limit or context):
        return
    stride = max(1, round(part * context))
    windows = cut(*documents, context=context, stride=stride, limit_tokens=limit)
    expected = np.zeros(len(documents))
    pieces = set()
    scored = scored_positions(windows, slice(None))
    for row, position in torch.nonzero(scored).tolist():
        expected[owner[row * stride + position]] += 1
        pieces.add((row, owner[row * stride + position]))
    found = windows.units
    assert found.documents == (expected > 0).sum()
    assert found.tokens.sum() == windows.tokens
    per_window = (windows.lengths - windows.first_scored).numpy()
    if found.documents == 1:
        assert found.kind == "windows of one document"
        assert (found.tokens == per_window).all()
        return
    assert found.kind == "documents"
    assert found.pieces == len(pieces)
    counted = np.zeros(len(expected))
    counted[: len(found.tokens)] = found.tokens
    assert (counted == expected).all()
    each = np.bincount(windows.pieces(slice(None), scored), minlength=found.pieces).astype(float)
    assert (found.by_unit(each) == found.tokens).all()
    assert (found.by_window(each) == per_window).all()


def test_the_end_of_text_belongs_to_the_document_before_it() -> None:
    # A token each: "a", end of text, "b" and "c". The first has nothing before it and is not scored.
    assert cut("a", "bc", context=4).units.tokens.tolist() == [1, 2]


def test_windows_in_any_order_have_the_same_pieces() -> None:
    windows = cut(*[prose(9, seed) for seed in range(6)], stride=5)
    scored = scored_positions(windows, slice(None))
    whole = windows.pieces(slice(None), scored)
    counts = scored.sum(1).tolist()
    by_window = dict(enumerate(whole.split(counts)))
    chosen = [4, 0, 2]
    assert torch.equal(
        windows.pieces(chosen, scored_positions(windows, chosen)), torch.cat([by_window[row] for row in chosen])
    )


def test_neighbours_of_very_many_documents_are_taken_together(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [prose(4, seed) for seed in range(11)]
    by_document = cut(*documents).units.tokens
    monkeypatch.setattr(units, "_MOST", 4)
    found = cut(*documents).units
    assert (found.kind, found.documents, len(found)) == ("groups of 3 documents", 11, 4)
    assert found.tokens.tolist() == [by_document[first : first + 3].sum() for first in (0, 3, 6, 9)]


def test_nats_by_document_and_by_window_come_to_the_same() -> None:
    windows = cut(*[prose(12, seed) for seed in range(7)], context=32, stride=20)
    decoder = tiny("llama").decoder
    by_document, by_window = unit_nats(decoder, windows), window_nats(decoder, windows)
    assert by_document.shape == (7,)
    assert by_document.sum() == by_window.sum()  # exact: single tokens' nats are float32, and added in float64
    assert (by_document > 0).all()
