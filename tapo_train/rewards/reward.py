"""The reward: a weighted sum of correctness and form, with the parts kept."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tapo_train.errors import ConfigError
from tapo_train.rewards.format import is_well_formed
from tapo_train.rewards.matching import exact_match
from tapo_train.types import Reward, Trajectory

__all__ = ["RewardFunction"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFunction:
    """total = accuracy_weight * accuracy + format_weight * format, both parts 0 or 1.

    The defaults are SenseNova-MARS's (1 and 0.5). Trajectories that failed outside
    the policy are scored like all others; it is the advantage stage that leaves
    them out.
    """

    accuracy_weight: float = 1.0
    format_weight: float = 0.5

    def __post_init__(self) -> None:
        for name in ("accuracy_weight", "format_weight"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ConfigError(f"reward.{name}: found {value}; wanted a finite number >= 0")

    def __call__(self, trajectory: Trajectory) -> Reward:
        """Score one trajectory; `parts` are unweighted."""
        accuracy = float(exact_match(trajectory.answer, trajectory.task.answers))
        form = float(is_well_formed(trajectory))
        return Reward(
            total=self.accuracy_weight * accuracy + self.format_weight * form,
            accuracy=accuracy,
            parts={"accuracy": accuracy, "format": form},
        )
