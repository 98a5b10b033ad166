from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import END_OF_TEXT, VOCABULARY, corpus, prose, tokenizer
from tokenizers import processors

from layerfold.errors import CorpusError, InputError
from layerfold.text.windows import TokenWindows, cut_windows

ACCENTED = "Zoë's naïve café — 映画 is 🎬🇫🇷, e\u0301 and ß"


def cut(*documents: str, **changes: Any) -> TokenWindows:
    return cut_windows(corpus(*documents), tokenizer(), **{"context": 8} | changes)


def stream(windows: TokenWindows) -> list[int]:
    """Every token of the windows once, where a later window repeats none of its context."""
    ids = windows.input_ids[0, : windows.lengths[0]].tolist()
    for row in range(1, len(windows)):
        fresh = windows.stride if windows.stride < windows.context else windows.context
        ids += windows.input_ids[row, windows.context - fresh : windows.lengths[row]].tolist()
    return ids


@settings(max_examples=150, deadline=None)
@given(length=st.integers(2, 60), context=st.integers(2, 20), part=st.floats(0, 1))
def test_each_token_is_scored_exactly_once(length: int, context: int, part: float) -> None:
    stride = max(1, round(part * context))
    text = "".join(chr(33 + i) for i in range(length))  # one token a character, each another
    if length < context:
        with pytest.raises(CorpusError, match=rf"{length} tokens; at least one window of {context}"):
            cut(text, context=context, stride=stride)
        return
    windows = cut(text, context=context, stride=stride)
    ids = tokenizer()(text)["input_ids"]
    assert len(set(ids)) == length
    scored: list[int] = []
    for row, window in enumerate(windows.input_ids.tolist()):
        first, last = int(windows.first_scored[row]), int(windows.lengths[row])
        assert window[:last] == ids[row * stride : row * stride + context]  # the stream's own tokens, in order
        assert 1 <= first < last <= context
        scored += window[first:last]
    # A disjoint window's first token has nothing before it; otherwise only the stream's first has not.
    skipped = set(ids[::context]) if stride == context else {ids[0]}
    assert sorted(scored) == sorted(set(ids) - skipped)
    assert windows.tokens == len(scored)


@pytest.mark.parametrize("document", ["plain ascii text\nin two lines", ACCENTED, prose(40)])
@pytest.mark.parametrize("stride", [1, 5, 7])
def test_bytes_are_the_raw_texts_less_the_first_tokens(document: str, stride: int) -> None:
    windows = cut(document, stride=stride)
    first_token = tokenizer()(document, return_offsets_mapping=True)["offset_mapping"][0]
    assert windows.bytes == len(document.encode()) - len(document[slice(*first_token)].encode())


def test_the_end_of_text_between_documents_counts_as_a_token_without_bytes() -> None:
    one, two = "a river", ACCENTED
    windows = cut(one, two, stride=4)
    first, second = (tokenizer()(text)["input_ids"] for text in (one, two))
    assert stream(windows) == [*first, VOCABULARY - 1, *second]
    assert tokenizer().decode(stream(windows)) == one + END_OF_TEXT + two
    assert windows.bytes == len((one + two).encode()) - len(b"a")


def test_bytes_of_text_that_ends_in_white_space_are_whole_when_offsets_are_trimmed() -> None:
    # RoBERTa-like tokenizers report offsets without the white space around a token.
    trimmed = copy.deepcopy(tokenizer())
    trimmed.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    document = "in the winter \n\n"
    windows = cut_windows(corpus(document), trimmed, context=8, stride=4)
    assert windows.bytes == len(document) - len("in")


def test_a_disjoint_cut_scores_no_bytes_of_first_tokens_and_pads_its_last_window_at_the_right() -> None:
    windows = cut("0123456789abcdefghijklm", context=8)
    assert windows.input_ids.shape == (3, 8)
    assert windows.lengths.tolist() == [8, 8, 7]
    assert tokenizer().decode(windows.input_ids[2, :7]) == "ghijklm"
    assert windows.bytes == windows.tokens == 23 - 3


@pytest.mark.parametrize(("limit", "lengths"), [(8, [8]), (5, [5]), (9, [8]), (10, [8, 2]), (99, [8, 8, 4])])
def test_limit_tokens_cuts_the_stream(limit: int, lengths: list[int]) -> None:
    assert cut("0123456789", "abcdefghi", limit_tokens=limit).lengths.tolist() == lengths


def test_a_seed_shuffles_the_documents_and_no_seed_keeps_their_order() -> None:
    documents = [prose(12, seed) for seed in range(8)]
    kept = tokenizer().decode(stream(cut(*documents))).split(END_OF_TEXT)
    shuffled = tokenizer().decode(stream(cut(*documents, seed=1))).split(END_OF_TEXT)
    assert kept == documents
    assert shuffled != documents
    assert sorted(shuffled) == sorted(documents)
    assert cut(*documents, seed=1).sha256 == cut(*documents, seed=1).sha256 != cut(*documents, seed=2).sha256


def test_the_hash_changes_with_whatever_changes_the_score() -> None:
    text = prose(40)
    hashes = {
        cut(text).sha256,
        cut(text, stride=4).sha256,
        cut(text, context=9).sha256,
        cut(text, limit_tokens=30).sha256,
        cut("?" + text).sha256,
    }
    assert len(hashes) == 5
    assert cut(text).sha256 in hashes
    assert cut(text, stride=8).sha256 in hashes  # the default, spelled out


def test_batches_cover_the_windows_in_order_and_hold_at_least_one() -> None:
    windows = cut(prose(80))
    for tokens in (1, 24, 10_000):
        batches = windows.batches(tokens)
        assert torch.equal(torch.cat([windows.input_ids[batch] for batch in batches]), windows.input_ids)
        assert all(1 <= batch.stop - batch.start <= max(1, tokens // 8) for batch in batches)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({"context": wrong}, f"context {wrong}: at least 2") for wrong in (1, -4)),
        *(({"stride": wrong}, rf"stride {wrong}; accepted: 1 \.\.\. 8") for wrong in (0, -1, 9)),
        *(({"limit_tokens": wrong}, f"limit of {wrong} tokens; accepted: 2 or more") for wrong in (1, -5)),
    ],
)
def test_a_setting_out_of_range_is_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        cut(prose(40), **changes)


def test_too_few_tokens_and_a_tokenizer_without_end_of_text_are_refused() -> None:
    with pytest.raises(CorpusError, match="corpus 'tiny' split 'test' has 3 tokens; at least one window of 8"):
        cut("abc")
    bare = tokenizer().__class__(tokenizer_object=tokenizer().backend_tokenizer)
    with pytest.raises(InputError, match="no end-of-text token"):
        cut_windows(corpus(), bare, context=8)


@settings(max_examples=60, deadline=None)
@given(length=st.integers(2, 60), context=st.integers(2, 20), limit=st.one_of(st.none(), st.integers(2, 80)))
def test_whole_windows_are_the_full_ones_of_the_cut_and_never_none(
    length: int, context: int, limit: int | None
) -> None:
    text = "".join(chr(33 + i) for i in range(length))
    if min(length, limit or length) < context:
        with pytest.raises((CorpusError, InputError), match=r"at least|accepted"):
            cut(text, context=context, limit_tokens=limit, whole=True)
        return
    found, all_of_them = (cut(text, context=context, limit_tokens=limit, whole=each) for each in (True, False))
    full = int((all_of_them.lengths == context).sum())
    assert len(found) == full == min(length, limit or length) // context
    assert torch.equal(found.input_ids, all_of_them.input_ids[:full])
    assert found.lengths.tolist() == [context] * full
    assert found.bytes == found.tokens == full * (context - 1)


def test_whole_windows_overlap_where_they_are_told_to_and_those_left_out_change_the_hash() -> None:
    for text, expected in (("0123456789", ["0123", "3456", "6789"]), ("012345678", ["0123", "3456"])):
        found = cut(text, context=4, stride=3, whole=True)
        assert [tokenizer().decode(row) for row in found.input_ids] == expected
    assert cut("0123456789").sha256 != cut("0123456789", whole=True).sha256
    assert cut("01234567").sha256 == cut("01234567", whole=True).sha256


@settings(max_examples=60, deadline=None)
@given(length=st.integers(4, 60), context=st.integers(3, 20), part=st.floats(0, 1))
def test_where_texts_begin_with_a_token_so_does_every_window_and_all_others_are_scored(
    length: int, context: int, part: float
) -> None:
    """As of Gemma and Llama 3, which were never trained on text without it."""
    begins = copy.deepcopy(tokenizer())
    first = begins.convert_tokens_to_ids(END_OF_TEXT)
    begins.add_special_tokens({"bos_token": END_OF_TEXT})
    begins.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, first)]
    )
    stride = max(1, round(part * context))
    text = "".join(chr(33 + i) for i in range(length))
    if length < context - 1:
        return
    windows = cut_windows(corpus(text), begins, context=context, stride=stride)
    assert windows.lead == 1
    assert windows.input_ids[:, 0].tolist() == [first] * len(windows)
    scored = [
        token
        for row, window in enumerate(windows.input_ids.tolist())
        for token in window[int(windows.first_scored[row]) : int(windows.lengths[row])]
    ]
    assert scored == tokenizer()(text)["input_ids"]
    assert windows.bytes == windows.tokens == length
    position = torch.arange(context)
    chosen = (position >= windows.first_scored[:, None]) & (position < windows.lengths[:, None])
    assert (
        windows.pieces(slice(None), chosen).tolist() == torch.nonzero(chosen)[:, 0].tolist()
    )  # windows of one document
    assert int(windows.units.tokens.sum()) == length
