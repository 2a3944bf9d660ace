"""The one boundary around the reward of a trajectory: late or broken, it takes no run down."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

from tapo_train.errors import RolloutError
from tapo_train.types import Reward, Trajectory

__all__ = ["Scoring"]

_WORDS = 300
"""Characters of a failure's message that are kept."""


class Scoring:
    """Gives a trajectory its reward, or the reason why it has none.

    A reward that fails, or is not there in time, says nothing about the policy: the trajectory
    leaves loss, baseline, credit and validation, as one whose tools broke.

    Args:
        deadline_s: [s] for the reward of one trajectory, all its parts together.
    """

    def __init__(
        self, reward: Callable[[Trajectory], Awaitable[Reward]], *, deadline_s: float
    ) -> None:
        self._reward = reward
        self._deadline_s = deadline_s

    async def __call__(self, trajectory: Trajectory) -> Trajectory:
        """The trajectory with `reward` or `unscored`; one that failed before stays as it is."""
        if trajectory.failed_outside_policy or trajectory.reward is not None:
            return trajectory
        try:
            async with asyncio.timeout(self._deadline_s):
                return trajectory.with_reward(await self._reward(trajectory))
        except TimeoutError as error:
            said = str(error) or f"no reward within reward.deadline_s = {self._deadline_s:g} s"
        except RolloutError:
            raise  # the run has left its recording, or its budget: no single reward's failure
        except ExceptionGroup as errors:
            fatal, others = errors.split(RolloutError)
            if fatal is not None:
                raise fatal.exceptions[0] from errors
            said = _in_words(others.exceptions[0] if others else errors)
        except Exception as error:  # noqa: BLE001  # the reward boundary: recorded, not fatal
            said = _in_words(error)
        return replace(trajectory, unscored=said[:_WORDS])


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
