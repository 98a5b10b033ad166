"""Words and sentences of any script, and that English ones are the package's."""

from __future__ import annotations

import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score import tokenize

from layerfold.text.examples import load_summaries
from layerfold.text.words import in_english_letters, sentences, terms, words

ENGLISH_WORD = re.compile(r"\w+(?:'\w+)?")
ENGLISH_END = re.compile(r"(?<=[.!?])\s+")


@given(st.text(alphabet=string.printable))
def test_of_ascii_text_terms_are_the_package_s_and_words_those_of_spaces(text: str) -> None:
    assert terms(text) == tokenize.tokenize(text, None)
    assert words(text) == ENGLISH_WORD.findall(text.lower())
    assert sentences(text) == [part for part in ENGLISH_END.split(text.strip()) if part]


def test_of_english_papers_terms_and_sentences_are_as_before() -> None:
    found = load_summaries("aclsum")
    for text in (*found.documents, *found.summaries):
        assert terms(text) == tokenize.tokenize(text, None)
        assert sentences(text) == ENGLISH_END.split(text.strip())
    assert in_english_letters(found.summaries)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Фильм хороший, Музыка — тоже.", ["фильм", "хороший", "музыка", "тоже"]),
        ("这是一个句子。第2章", ["这", "是", "一", "个", "句", "子", "第", "2", "章"]),
        ("コーヒーを飲む", ["コ", "ー", "ヒ", "ー", "を", "飲", "む"]),
        ("한국어 단어", ["한국어", "단어"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("مرحبا بالعالم", ["مرحبا", "بالعالم"]),
        ("naïve café, Größe", ["naïve", "café", "größe"]),
        ("GPT模型2023年", ["gpt", "模", "型", "2023", "年"]),
        ("🎬 … — 。", []),
    ],
)
def test_words_of_a_script_are_runs_of_letters_or_characters(text: str, expected: list[str]) -> None:
    assert terms(text) == words(text) == expected


def test_the_same_letters_are_the_same_term_however_they_are_encoded() -> None:
    assert terms("cafe\u0301") == terms("café")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("电影很好。音乐也好！结尾弱？ 第四句", ["电影很好。", "音乐也好！", "结尾弱？", "第四句"]),
        ("「はい。」と言った。次。", ["「はい。」", "と言った。", "次。"]),
        ("真的吗？！是。", ["真的吗？！", "是。"]),
        ("Это. То! Да? Нет", ["Это.", "То!", "Да?", "Нет"]),
        ("वह। यह।", ["वह।", "यह।"]),
        ("هل هذا؟ نعم.", ["هل هذا؟", "نعم."]),
        ("  One. 2.5 of it! ", ["One.", "2.5 of it!"]),
    ],
)
def test_sentences_end_where_their_script_ends_them(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


def test_english_has_few_letters_beyond_ascii() -> None:
    assert in_english_letters(["A naïve café stood " + "in the street and people sang there " * 20])
    assert in_english_letters([])
    assert in_english_letters(["1, 2, 3"])
    assert not in_english_letters(["Der Bär läuft über die Straße"])
    assert not in_english_letters(["Фильм хороший"])
    assert not in_english_letters(["An English sentence", "这是一个句子"])
