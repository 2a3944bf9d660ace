"""A run by plain steps: ask, play, train, one after the other, without a stream.

For what a run without staleness has to be equal to. Everything but the rounds is the product's.
"""

from __future__ import annotations

from typing import Any

from tapo_train.data.sampler import TaskSampler
from tapo_train.training.parts import Play, Rolled
from tapo_train.types import JsonObject, Task


class PlainSteps:
    """The next questions, played to their end; on one rank."""

    def __init__(self, tasks: list[Task], order: TaskSampler, play: Play, recipe: Any) -> None:
        self._tasks, self._order, self._play = tasks, order, play
        self._per_step = recipe.data.questions_per_step
        self._rollouts = recipe.rollout.rollouts_per_question

    def __call__(self, step: int) -> Rolled:
        asked = [self._tasks[index] for index in self._order.next_batch(self._per_step)]
        groups = self._play(asked, rollouts=self._rollouts, greedy=False, policy_version=step)
        return Rolled(groups=groups, questions=list(range(len(groups))))

    def close(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: JsonObject) -> None:
        pass


def plain_steps(recipe: Any, tasks: Any, order: Any, player: Any, interruption: Any) -> PlainSteps:
    """In place of `build_rounds`."""
    player.groups.close()
    return PlainSteps(tasks, order, player.play, recipe)
