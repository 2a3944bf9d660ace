"""Rules that compare an answer with the accepted ones: pure functions of texts.

Sources: token F1 as SQuAD and MMSearch count it; numbers as InfoSeek's evaluator does
(`infoseek_eval`: one accepted number stands for ±10 %, a range is met by a number or a range inside
it, or by a range that overlaps by half); letters of multiple choice as in SenseNova-MARS. Where
more than one answer is accepted, the best comparison counts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from tapo_train.rewards.matching import exact_match, normalise

__all__ = ["choice_match", "letter_of", "numbers_in", "numeric_match", "token_f1"]

_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?![\d])"
)
_RANGE = re.compile(r"(?<=\d)\s*(?:-|–|—|\bto\b|\band\b)\s*(?=[-+]?\.?\d)")
_LETTER = re.compile(
    r"\s*(?:(?:the\s+)?(?:correct\s+)?(?:answer|option|choice)\s*(?:is|:)?\s*)?"
    r"[(\[*]*([A-Za-z])(?:[)\].:,*]+(?:\s.*)?|\s*)",
    re.IGNORECASE | re.DOTALL,
)


def token_f1(answer: str | None, accepted: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the normalised words, as bags; best of accepted."""
    words = Counter(normalise(answer or "").split())
    return max((_f1(words, Counter(normalise(text).split())) for text in accepted), default=0.0)


def _f1(found: Counter[str], wanted: Counter[str]) -> float:
    shared = (found & wanted).total()
    return 2 * shared / (found.total() + wanted.total()) if shared else 0.0


def numbers_in(text: str) -> list[float]:
    """The numbers of a text, in order; "1,234.5 m" holds one, "10-20" two."""
    spaced = _RANGE.sub(" .. ", text.replace("\u2212", "-"))
    found = [match[0].replace(",", "") for match in _NUMBER.finditer(spaced)]
    return [float(number) for number in found]


def numeric_match(
    answer: str | None,
    accepted: Sequence[str],
    *,
    relative: float = 0.1,
    absolute: float = 0.0,
    overlap: float = 0.5,
) -> bool:
    """Whether an answer's number or range meets an accepted number or range.

    An accepted text with two numbers is a range; one with one number v stands for
    [v - d, v + d], d = max(relative |v|, absolute). The answer's two numbers are a range too;
    otherwise its first number counts. Deviation from InfoSeek's code: an answer without a number
    is wrong, not 0.

    Args:
        overlap: of two ranges, the least share of their union that they have in common.
    """
    said = numbers_in(answer or "")
    if not said:
        return False
    for text in accepted:
        wanted = numbers_in(text)
        if not wanted:
            continue
        low, high = _bounds(wanted, relative, absolute)
        if len(said) == 2:
            own = (min(said), max(said))
            is_inside = low <= own[0] and own[1] <= high
            if is_inside or _overlap(own, (low, high)) >= overlap:
                return True
        elif low <= said[0] <= high:
            return True
    return False


def _bounds(wanted: Sequence[float], relative: float, absolute: float) -> tuple[float, float]:
    if len(wanted) == 2:
        return min(wanted), max(wanted)
    slack = max(relative * abs(wanted[0]), absolute)
    return wanted[0] - slack, wanted[0] + slack


def _overlap(left: tuple[float, float], right: tuple[float, float]) -> float:
    """Length of the intersection over that of the union; equal points overlap wholly."""
    if left == right:
        return 1.0
    union = max(left[1], right[1]) - min(left[0], right[0])
    shared = min(left[1], right[1]) - max(left[0], right[0])
    return max(0.0, shared / union)


def letter_of(text: str) -> str | None:
    """The letter that a text chooses, as in "B", "(b)", "B. Paris", "The answer is B"."""
    match = _LETTER.fullmatch(text.strip())
    return match[1].upper() if match else None


def choice_match(answer: str | None, accepted: Sequence[str]) -> bool:
    """Whether an answer chooses an accepted letter, or says an accepted option's whole text."""
    if answer is None:
        return False
    letter = letter_of(answer)
    if letter is not None:
        return letter in {letter_of(text) for text in accepted}
    return exact_match(answer, accepted)
