"""The reward: a weighted sum of named parts, chosen by the task's data source."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from tapo_train.errors import ConfigError, TapoError
from tapo_train.rewards.score import Part, Score
from tapo_train.types import Reward, Trajectory

__all__ = ["ACCURACY", "RewardFunction", "Weighted"]

ACCURACY = "accuracy"
"""The part that says whether the outcome is right: what is validated, and what credit goes by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighted:
    """A part with its weight."""

    part: Part
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFunction:
    """total = sum of weight * part. All parts of a trajectory are asked at the same time.

    What a part raises is raised: then the trajectory has no reward at all, because a total that
    lacks a part would be another reward.
    """

    parts: Mapping[str, Weighted]
    by_source: Mapping[str, Mapping[str, Weighted]] = field(default_factory=dict)
    """By `Task.source`: what such tasks are judged by in place of `parts`."""

    def __post_init__(self) -> None:
        for where, parts in (("parts", self.parts), *self.by_source.items()):
            if ACCURACY not in parts:
                raise ConfigError(
                    f"reward.{where}: found {', '.join(parts) or 'no part'}; wanted one named "
                    f"{ACCURACY!r}, which says whether the outcome is right"
                )

    async def __call__(self, trajectory: Trajectory) -> Reward:
        """Score one trajectory; `parts` of the result are unweighted."""
        parts = self.by_source.get(trajectory.task.source, self.parts)
        async with asyncio.TaskGroup() as group:
            asked = {
                name: group.create_task(_ask(weighted.part, trajectory))
                for name, weighted in parts.items()
            }
        found = {name: task.result() for name, task in asked.items()}
        accuracy = found[ACCURACY].value
        if not 0.0 <= accuracy <= 1.0:
            raise TapoError(f"the part {ACCURACY} gave {accuracy}; wanted a number in [0, 1]")
        return Reward(
            total=sum(parts[name].weight * score.value for name, score in found.items()),
            accuracy=accuracy,
            parts={name: score.value for name, score in found.items()},
            turns=_turns(trajectory, found, parts),
        )


async def _ask(part: Part, trajectory: Trajectory) -> Score:
    return await part(trajectory)


def _turns(
    trajectory: Trajectory, found: Mapping[str, Score], parts: Mapping[str, Weighted]
) -> tuple[float, ...]:
    """What of the total is due to each turn; () if no part speaks of turns."""
    num = len(trajectory.turns)
    total = [0.0] * num
    is_by_turn = False
    for name, score in found.items():
        if not score.turns:
            continue
        if len(score.turns) != num:
            raise TapoError(
                f"the part {name} gave {len(score.turns)} turns; wanted {num}, one per turn"
            )
        is_by_turn = True
        for turn, value in enumerate(score.turns):
            total[turn] += parts[name].weight * value
    return tuple(total) if is_by_turn else ()
