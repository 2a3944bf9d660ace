"""Two runs on the same questions: is one better, or was it luck?

McNemar's exact test where each question has one verdict per run; a bootstrap of the difference by
question in any case. Questions that only one run could answer for are left out, and counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tapo_train.errors import DataError
from tapo_train.evaluation.attempt import Attempt
from tapo_train.evaluation.estimates import bootstrap_means, by_question

__all__ = ["Comparison", "compared", "mcnemar"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The second run against the first."""

    questions: int
    """That both answered for."""
    left_out: int
    """That only one did."""
    first: float
    """Mean accuracy over the questions."""
    second: float
    difference: float
    low: float
    high: float
    """95 % interval of the difference, by question."""
    gained: int | None
    """Questions that the second run alone has right; None where a question has several attempts."""
    lost: int | None
    p: float | None
    """McNemar's, exact and two-sided."""

    def __str__(self) -> str:
        said = (
            f"{self.first:.3f} -> {self.second:.3f}: {self.difference:+.3f} "
            f"[{self.low:+.3f}, {self.high:+.3f}], n={self.questions}"
        )
        if self.p is not None:
            said += f"; {self.gained} gained, {self.lost} lost, McNemar p = {self.p:.4f}"
        return said + (f"; {self.left_out} questions left out" if self.left_out else "")


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p of the exact test: of `gained` + `lost` fair coins so uneven a split or more."""
    changed = gained + lost
    tail = sum(math.comb(changed, number) for number in range(min(gained, lost) + 1))
    return float(min(1.0, 2 * tail / 2**changed))


def compared(first: Sequence[Attempt], second: Sequence[Attempt]) -> Comparison:
    """Compare by question.

    Raises:
        DataError: they share none.
    """
    left, right = by_question(first), by_question(second)
    shared = sorted(left.keys() & right.keys())
    if not shared:
        raise DataError("the two evaluations have no question in common that both answered for")
    before, after = (np.array([_mean(held[name]) for name in shared]) for held in (left, right))
    low, high = np.quantile(bootstrap_means(after - before), (0.025, 0.975))
    gained = lost = p = None
    if _is_single(left, shared) and _is_single(right, shared):
        gained = int(((after == 1) & (before != 1)).sum())
        lost = int(((after != 1) & (before == 1)).sum())
        p = mcnemar(gained, lost)
    return Comparison(
        questions=len(shared),
        left_out=len(left.keys() ^ right.keys()),
        first=float(before.mean()),
        second=float(after.mean()),
        difference=float((after - before).mean()),
        low=float(low),
        high=float(high),
        gained=gained,
        lost=lost,
        p=p,
    )


def _mean(attempts: Sequence[Attempt]) -> float:
    values = [attempt.accuracy or 0.0 for attempt in attempts]
    return math.fsum(values) / len(values)


def _is_single(held: Mapping[str, Sequence[Attempt]], names: Sequence[str]) -> bool:
    return all(len(held[name]) == 1 for name in names)
