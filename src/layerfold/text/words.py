"""Words and sentences of any script.

A word is a run of letters, marks and digits. Scripts that put no space between words (Chinese, Japanese, Thai, Lao,
Khmer, Burmese) are cut into characters instead, each with the marks on it.
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
"""Least share of ASCII among the letters of English text, which has a naïve café here and there."""
_CLOSING = "」』”’）"
_SENTENCE_END = regex.compile(
    r"(?<=[.!?؟۔।։።])\s+"  # Latin and Cyrillic, Arabic, Urdu, Devanagari, Armenian, Ethiopic
    rf"|(?<=[。！？｡][{_CLOSING}]*)(?![。！？｡{_CLOSING}])\s*"  # Chinese and Japanese, without a space behind
)


def words(text: str) -> list[str]:
    """Return the words of a text in lower case; one apostrophe may stand within a word, as in ``don't``."""
    found: list[str] = _WORD.findall(text.lower())
    return found


def terms(text: str) -> list[str]:
    """Return words in lower case, split at apostrophes and underscores too: what ROUGE counts.

    Of a text in ASCII these are the tokens of the ``rouge-score`` package before stemming.
    """
    found: list[str] = _TERM.findall(unicodedata.normalize("NFC", text.lower()))
    return found


def in_english_letters(texts: Iterable[str]) -> bool:
    """Whether 99.5 % of all letters are those of ASCII, or there are none."""
    letters = [letter for text in texts for letter in _LETTER.findall(text)]
    return sum(map(str.isascii, letters)) >= _ENGLISH * len(letters)


def sentences(text: str) -> list[str]:
    """Return the sentences of a text, without the white space between them."""
    return [sentence for sentence in _SENTENCE_END.split(text.strip()) if sentence]
