"""What a part of a reward gives, and what turns parts into one."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tapo_train.errors import TapoError
from tapo_train.types import Trajectory

__all__ = ["Part", "Rule", "Score", "by_rule"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One part's judgement, before its weight."""

    value: float
    """Finite. Of the part that is the correctness: in [0, 1]."""
    turns: tuple[float, ...] = ()
    """[turns] what of `value` is due to each assistant turn; () if it is about the whole."""

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (self.value, *self.turns))):
            raise TapoError(f"a reward of {self.value} with turns {self.turns}; wanted numbers")


Part = Callable[[Trajectory], Awaitable[Score]]
"""Judges a trajectory that is over. What it raises is a failure outside the policy."""

Rule = Callable[[Trajectory], Score | float | bool]
"""A part that only computes, and not for long."""


def by_rule(rule: Rule) -> Part:
    """A rule as a part."""

    async def part(trajectory: Trajectory) -> Score:
        return scored(rule(trajectory))

    return part


def scored(found: object) -> Score:
    """A number as the score of the whole trajectory.

    Raises:
        TapoError: it is neither a number nor a score.
    """
    if isinstance(found, Score):
        return found
    if isinstance(found, (int, float)):
        return Score(value=float(found))
    raise TapoError(f"a reward gave {found!r}; wanted a number or a Score")
