"""How sure an accuracy is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tapo_train.errors import DataError

__all__ = ["Accuracy", "accuracy_of"]

Z_95 = 1.959963984540054
"""97.5 % quantile of the normal distribution: a two-sided 95 % interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """A share of correct answers with its 95 % confidence interval."""

    correct: int
    num: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """correct / num."""
        return self.correct / self.num

    def __str__(self) -> str:
        return f"{self.value:.3f} (95 % interval {self.low:.3f} to {self.high:.3f}, n={self.num})"


def accuracy_of(correct: int, num: int, *, z: float = Z_95) -> Accuracy:
    """Wilson's score interval (Wilson 1927, without continuity correction).

    Unlike p ± z·sqrt(p(1-p)/n) it stays in [0, 1] and has a width at p = 0 and p = 1.
    """
    if not 0 <= correct <= num or num == 0:
        raise DataError(f"{correct} correct of {num}; wanted 0 <= correct <= number, number > 0")
    share = correct / num
    scale = 1 + z * z / num
    middle = (share + z * z / (2 * num)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    # At the ends the formula gives 0 or 1 up to rounding; the bound there is exact.
    low = 0.0 if correct == 0 else middle - half
    high = 1.0 if correct == num else middle + half
    return Accuracy(correct=correct, num=num, low=low, high=high)
