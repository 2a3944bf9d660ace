"""Estimates over questions that were tried several times, and how sure they are.

Questions are the sample, not attempts: an interval is a percentile bootstrap that draws whole
questions, so that attempts at one question are not taken for independent.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tapo_train.evaluation.attempt import Attempt

__all__ = ["DRAWS", "Estimate", "average", "by_question", "interval", "pass_at"]

DRAWS = 2000
_SEED = 0
"""Fixed: the same attempts give the same interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over questions with its 95 % interval."""

    value: float
    low: float
    high: float
    questions: int
    """That were counted."""

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def by_question(attempts: Iterable[Attempt]) -> dict[str, list[Attempt]]:
    """Attempts that say something about the policy, by benchmark and task."""
    held: dict[str, list[Attempt]] = defaultdict(list)
    for attempt in attempts:
        if not attempt.failed:
            held[f"{attempt.benchmark}\0{attempt.task}"].append(attempt)
    return dict(held)


def pass_at(k: int, right: int, tried: int) -> float | None:
    """Chance that one of k attempts drawn from `tried` is right (2107.03374, eq. 1).

    None if fewer than k were made.
    """
    if tried < k:
        return None
    return 1.0 - math.comb(tried - right, k) / math.comb(tried, k)


def average(values: Sequence[float]) -> Estimate | None:
    """Mean of one value per question; None without any."""
    if not values:
        return None
    low, high = interval(np.asarray(values, dtype=np.float64))
    return Estimate(
        value=math.fsum(values) / len(values), low=low, high=high, questions=len(values)
    )


def interval(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """2.5 % and 97.5 % quantiles of the mean of [n] values drawn with replacement."""
    means = bootstrap_means(values)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def bootstrap_means(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """[DRAWS] means of [n] values drawn with replacement."""
    rng = np.random.default_rng(_SEED)
    # One draw at a time: memory does not grow with their number.
    return np.array(
        [values[rng.integers(len(values), size=len(values))].mean() for _ in range(DRAWS)]
    )
