"""Words and sentences of any script.

A word is a run of letters, marks and digits. Scripts without spaces between words (Chinese, Japanese, Thai, Lao, Khmer,
Burmese) are cut into characters instead, each with its marks.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

import regex

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_CHARACTER = rf"[[{_UNSPACED}]&&[\p{{L}}\p{{N}}]]\p{{M}}*"
_RUN = rf"[[\p{{L}}\p{{M}}\p{{N}}_]--[{_UNSPACED}]]+"
_WORD = regex.compile(rf"{_CHARACTER}|{_RUN}(?:'{_RUN})?", regex.V1)
_TERM = regex.compile(rf"{_CHARACTER}|{_RUN.replace('_]', ']')}", regex.V1)
_LETTER = regex.compile(r"\p{L}")
_ENGLISH = 0.995
"""Minimum share of ASCII among the letters of English text, which contains words such as naïve and café."""
_CLOSING = "」』”’）"
_SENTENCE_END = regex.compile(
    r"(?<=[.!?؟۔।։።])\s+"  # Latin and Cyrillic, Arabic, Urdu, Devanagari, Armenian, Ethiopic
    rf"|(?<=[。！？｡][{_CLOSING}]*)(?![。！？｡{_CLOSING}])\s*"  # Chinese and Japanese, without a space behind
)


def words(text: str) -> list[str]:
    """Return the words of a text in lower case; a word may contain one apostrophe, as in ``don't``."""
    return list(_WORD.findall(text.lower()))


def terms(text: str) -> list[str]:
    """Return the words that ROUGE counts: in lower case, split at apostrophes and underscores too.

    For a text in ASCII they equal the tokens of the ``rouge-score`` package before stemming.
    """
    return list(_TERM.findall(unicodedata.normalize("NFC", text.lower())))


def in_english_letters(texts: Iterable[str]) -> bool:
    """Whether at least 99.5 % of all letters are ASCII; true without letters."""
    letters = [letter for text in texts for letter in _LETTER.findall(text)]
    return sum(map(str.isascii, letters)) >= _ENGLISH * len(letters)


def sentences(text: str) -> list[str]:
    """Return the sentences of a text, stripped of white space."""
    return [sentence for sentence in _SENTENCE_END.split(text.strip()) if sentence]
