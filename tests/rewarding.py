"""The reward of correctness and form, for tests that need one."""

from __future__ import annotations

import asyncio
import zlib

from tapo_train.rewards.format import is_well_formed
from tapo_train.rewards.matching import exact_match
from tapo_train.rewards.reward import RewardFunction, Weighted
from tapo_train.rewards.score import by_rule
from tapo_train.rewards.scoring import Scoring
from tapo_train.types import Reward, Trajectory


def correctness_and_form(*, accuracy: float = 1.0, form: float = 0.5) -> RewardFunction:
    """As recipes have it by default."""
    return RewardFunction(
        parts={
            "accuracy": Weighted(
                part=by_rule(lambda t: exact_match(t.answer, t.task.answers)), weight=accuracy
            ),
            "format": Weighted(part=by_rule(is_well_formed), weight=form),
        }
    )


def reward_of(trajectory: Trajectory, **weights: float) -> Reward:
    """What a trajectory earns."""
    return asyncio.run(correctness_and_form(**weights)(trajectory))


def mixed_for_some(trajectory: Trajectory, *, one_of: int) -> float:
    """Every second attempt at one of so many questions earns 1, by their ids alone."""
    is_mixed = zlib.crc32(trajectory.task.id.encode()) % one_of == 0
    return float(is_mixed and int(trajectory.id.rpartition(".")[2]) % 2)


def scoring(**weights: float) -> Scoring:
    """For `collect`."""
    return Scoring(correctness_and_form(**weights), deadline_s=60.0)
