"""Whether an answer equals one of the accepted ones, after normalisation.

The normalisation is SQuAD's, as SenseNova-MARS and MMSearch-R1 use it: lower case,
no punctuation, no articles, single spaces. Known weakness, kept for comparability:
"1.5" and "15" become equal. Deviations:

* NFKC first, so that full-width digits, ligatures and composed accents compare
  equal; all Unicode punctuation is removed, not only ASCII's.
* A text of nothing but punctuation and articles (blood group "A", "-") keeps its
  lower-cased form. Otherwise all such texts would be equal.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable

__all__ = ["exact_match", "normalise"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise(text: str) -> str:
    """The comparable form of an answer; "" only for white space."""
    lowered = unicodedata.normalize("NFKC", text).lower()
    kept = "".join(character for character in lowered if not _is_punctuation(character))
    bare = " ".join(_ARTICLES.sub(" ", kept).split())
    return bare or " ".join(lowered.split())


def _is_punctuation(character: str) -> bool:
    # ASCII's $+<=>^`|~ are symbols to Unicode but punctuation to SQuAD.
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def exact_match(answer: str | None, accepted: Iterable[str]) -> bool:
    """True if `answer` has the normal form of any accepted text; never for a blank answer."""
    if answer is None or not (form := normalise(answer)):
        return False
    return any(normalise(text) == form for text in accepted)
