"""Scores of an answer as the benchmarks' own papers compute them, where a rule does.

Sources: SQuAD's token F1 (MMSearch); F1 over sets of tokens (MAT-Search); InfoSeek's evaluator
(`infoseek_eval`); SimpleVQA's shares. Normalisation is `matching.normalise`: theirs, after NFKC.
What a paper leaves to a judge has no rule here, and nothing stands in for it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tapo_train.rewards.answers import choice_match, token_f1
from tapo_train.rewards.matching import exact_match, normalise
from tapo_train.types import Task

__all__ = [
    "JUDGE",
    "Scored",
    "attempted_scores",
    "infoseek_final",
    "infoseek_match",
    "infoseek_numbers",
    "metric_of",
    "official_score",
    "token_set_f1",
]

JUDGE = "judge"
_NUMBER = re.compile(r"[-+]?\.?\d+(?:,\d{3})*\.?\d*(?:[eE][-+]?\d+)?")
_TOUCHING = 1e-12
"""How far below a half two ranges may overlap, in InfoSeek's code."""


def metric_of(task: Task) -> str:
    """Name of the score of the task's benchmark: what its file's format says, or exact match."""
    said = task.metadata.get("metric")
    if isinstance(said, str):
        return said
    return JUDGE if task.source.startswith("livevqa") else "exact_match"


def official_score(task: Task, answer: str | None) -> float | None:
    """In [0, 1]; None if no rule computes it: a judge, or a database."""
    match metric_of(task):
        case "exact_match":
            return float(exact_match(answer, task.answers))
        case "token_f1":
            return token_f1(answer, task.answers)
        case "token_set_f1":
            return token_set_f1(answer, task.answers)
        case "multiple_choice":
            return float(choice_match(answer, task.answers))
        case "infoseek":
            kind = str(task.metadata.get("question_type", ""))
            return float(infoseek_match(answer, task.answers, question_type=kind))
        case _:
            return None


def token_set_f1(answer: str | None, accepted: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the normalised words as sets; best of accepted.

    Equal normal forms give 1, blank ones too.
    """
    words = set(normalise(answer or "").split())
    return max((_set_f1(words, set(normalise(text).split())) for text in accepted), default=0.0)


def _set_f1(found: set[str], wanted: set[str]) -> float:
    if found == wanted:
        return 1.0
    shared = len(found & wanted)
    return 2 * shared / (len(found) + len(wanted)) if shared else 0.0


def infoseek_match(answer: str | None, accepted: Sequence[str], *, question_type: str) -> bool:
    """InfoSeek's: exact match, for a numerical question an overlap of ranges.

    Args:
        accepted: of a numerical question, "low - high".
        question_type: String, Time or Numerical; "" is told from `accepted`.
    """
    if question_type.lower() not in ("numerical", ""):
        return exact_match(answer, accepted)
    bounds = [infoseek_numbers(text) for text in accepted]
    if question_type == "" and not all(
        " - " in text and len(b) == 2 for text, b in zip(accepted, bounds, strict=True)
    ):
        return exact_match(answer, accepted)
    said = _said_range(infoseek_numbers(answer or ""))
    return any(len(b) >= 2 and _meets(said, (b[0], b[1])) for b in bounds)


def infoseek_numbers(text: str) -> list[float]:
    """The numbers that InfoSeek's evaluator reads in a text, in order."""
    spaced = "".join(
        " - " if sign == "-" and place and text[place - 1].isdigit() else sign
        for place, sign in enumerate(text)
    )
    found = (match[0].replace(",", "").strip(".") for match in _NUMBER.finditer(spaced))
    # ".5.2" is read as nothing; the evaluator itself breaks there.
    whole = (number.split(".")[0] if number.count(".") > 1 else number for number in found)
    return [float(number) for number in whole if number.strip("+-")]


def _said_range(numbers: Sequence[float]) -> float | tuple[float, float]:
    """The first two numbers as a range if they rise, else the first; none counts as [0, 0]."""
    if not numbers:
        return 0.0, 0.0
    if len(numbers) > 1 and numbers[0] <= numbers[1]:
        return numbers[0], numbers[1]
    return numbers[0]


def _meets(said: float | tuple[float, float], wanted: tuple[float, float]) -> bool:
    low, high = wanted
    if isinstance(said, float):
        return low <= said <= high
    if low <= said[0] <= high and low <= said[1] <= high:
        return True
    shared = max(0.0, min(said[1], high) - max(said[0], low))
    lengths = (said[1] - said[0]) + (high - low) + 2 * _TOUCHING
    return shared / (lengths - shared) >= 0.5 - _TOUCHING


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """An answer's score, with what an overall score groups by."""

    score: float
    split: str = ""
    """InfoSeek's data_split."""


def infoseek_final(rows: Iterable[Scored]) -> Mapping[str, float]:
    """Harmonic mean of the accuracies on unseen questions and on unseen entities.

    As in the evaluator every split that does not end in unseen_question counts as the other; if
    one of both has no rows or no right answer the mean is (nearly) 0.
    """
    held: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        is_question = row.split.endswith("unseen_question")
        held["unseen_question" if is_question else "unseen_entity"].append(row.score)
    means = {
        name: sum(held[name]) / len(held[name]) if held[name] else 0.0
        for name in ("unseen_question", "unseen_entity")
    }
    total = sum(1.0 / (mean or 1e-12) for mean in means.values())
    return {**means, "final": 2 / total}


def attempted_scores(right: Sequence[float], is_attempted: Sequence[bool]) -> Mapping[str, float]:
    """SimpleVQA's shares: correct (CO), incorrect (IN), not attempted (NA), correct given attempted
    (CGA), and the harmonic mean of CO and CGA (F1).
    """
    num = len(right)
    if not num:
        return {}
    correct = sum(right) / num
    attempted = sum(is_attempted) / num
    given = correct / attempted if attempted else 0.0
    both = correct + given
    return {
        "CO": correct,
        "IN": attempted - correct,
        "NA": 1 - attempted,
        "CGA": given,
        "F1": 2 * correct * given / both if both else 0.0,
    }
