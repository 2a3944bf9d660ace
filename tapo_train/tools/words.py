"""Where words begin and end in scripts that are written without blanks."""

from __future__ import annotations

import re
import unicodedata

__all__ = ["spread"]

_HAN = "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WITHOUT_BLANKS = (
    f"{_HAN}\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"  # kana
    "\uac00-\ud7af"  # Hangul: its blanks do not part a word from its particles
    "\u0e01-\u0e4e\u0e81-\u0ecd\u1000-\u103f\u1780-\u17d3"  # Thai, Lao, Burmese, Khmer
)
_RUN = re.compile(f"[{_WITHOUT_BLANKS}]+")
_IS_HAN = re.compile(f"[{_HAN}]")


def spread(text: str) -> str:
    """The text with blanks between what is to be looked for, in normal form NFKC.

    A run of letters of a script without blanks becomes its pairs, as in Lucene's CJK analyser, so
    that a compound is found by any of its words; a Han character is a word of its own besides.
    Other scripts stay as they are. Half a surrogate pair becomes a question mark.
    """
    if text.isascii():
        return text
    whole = text.encode("utf-8", "replace").decode()
    return _RUN.sub(_pieces, unicodedata.normalize("NFKC", whole))


def _pieces(run: re.Match[str]) -> str:
    letters = run[0]
    pairs = [letters[at : at + 2] for at in range(len(letters) - 1)] or [letters]
    single = [letter for letter in letters if _IS_HAN.match(letter)] if len(letters) > 1 else []
    return f" {' '.join((*pairs, *single))} "
