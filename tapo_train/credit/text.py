"""Text normalisation: when two queries ask for the same thing."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

ARTICLES = frozenset({"a", "an", "the"})

_ASCII_BLANKS = "".join(chr(code) if chr(code).isalnum() else " " for code in range(128))

# Scripts written without blanks between words: each character is a token.
_CJK = re.compile(
    "([\u3040-\u30ff"  # kana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # ideographs
    "\uac00-\ud7af"  # hangul
    "\U00020000-\U0003134f])"  # ideographs beyond the basic plane
)

_VERBATIM = "\0"
"""Marks the stand-in token of a text without tokens; no real token holds a NUL."""


def _spaced(text: str) -> str:
    """Letters, marks and numbers stay, all else becomes a blank; CJK stands alone."""
    kept = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text)
    return _CJK.sub(r" \1 ", kept)


def _tokens(text: str) -> list[str]:
    """Normalised tokens, articles included."""
    if text.isascii():
        return text.lower().translate(_ASCII_BLANKS).split()
    folded = unicodedata.normalize("NFKC", text).casefold()
    # Case folding can undo the composition; a second pass settles it.
    return _spaced(unicodedata.normalize("NFKC", folded)).split()


def words(text: str) -> list[str]:
    """Normalised tokens in order: NFKC, case-folded, no punctuation, no articles, CJK split.

    >>> words("The height of Eiffel-Tower?")
    ['height', 'of', 'eiffel', 'tower']
    """
    return [word for word in _tokens(text) if word not in ARTICLES]


def token_set_of(text: str) -> frozenset[str]:
    """The set of `words`; of a text without any, one stand-in token that is the text itself.

    The stand-in makes the Jaccard index of two such texts 1 if they are equal after trimming
    and case folding and 0 otherwise, without a special case.
    """
    tokens = frozenset(_tokens(text))
    if not tokens.isdisjoint(ARTICLES):
        tokens -= ARTICLES
    return tokens or frozenset({_VERBATIM + text.strip().casefold()})


token_set = lru_cache(maxsize=8192)(token_set_of)
"""`token_set_of` for queries, which are short and come again."""


@lru_cache(maxsize=8192)
def trigram_set(text: str) -> frozenset[str]:
    """Character 3-grams of the normalised text, with a border of one blank."""
    joined = " ".join(words(text))
    if not joined:
        return token_set(text)
    padded = f" {joined} "
    return frozenset(padded[i : i + 3] for i in range(len(padded) - 2))


def jaccard(left: frozenset[str], right: frozenset[str]) -> float:
    """|A and B| / |A or B|; 1 for two empty sets."""
    common = len(left & right)
    total = len(left) + len(right) - common
    return common / total if total else 1.0
