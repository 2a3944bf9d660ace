"""A step's questions to groups, in as many rounds as it takes until the batch is informative.

Without it questions come in a stream (`stream.py`).

Positions in the global batch decide which update a group belongs to, so a question that
replaces another takes over its position, and neither draw nor positions depend on the
number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tapo_train.data.sampler import TaskSampler, shard
from tapo_train.learner import distributed
from tapo_train.training.interruption import Interruption, StepGivenUp
from tapo_train.training.parts import Play, Rolled
from tapo_train.types import Group, JsonObject, Task

__all__ = ["Questions", "Refill", "is_informative"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """What a step asks, and of whom."""

    tasks: Sequence[Task]
    order: TaskSampler
    play: Play
    interruption: Interruption
    per_step: int
    """Over all ranks."""
    rollouts: int
    """Per question."""

    def share(self, places: Mapping[int, int]) -> dict[int, int]:
        """This rank's share of the `places` (position -> task) of all ranks."""
        return dict(shard(list(places.items()), distributed.rank(), distributed.world_size()))

    def ask(self, mine: Mapping[int, int], step: int) -> dict[int, Group]:
        """Play the tasks of this rank's places; groups by position. On all ranks together.

        Raises:
            StepGivenUp: on all ranks, if one was asked to stop.
        """
        play = partial(
            self.play,
            [self.tasks[index] for index in mine.values()],
            rollouts=self.rollouts,
            greedy=False,
            policy_version=step,
        )
        groups = self.interruption.attempt(play)
        is_given_up = distributed.all_reduce_max(int(groups is None))
        if groups is None or is_given_up:
            raise StepGivenUp
        return dict(zip(mine, groups, strict=True))


class Refill:
    """Dynamic sampling (DAPO, 2503.14476): groups that teach nothing give way to new questions.

    After each round the groups whose usable trajectories all earned the same are replaced
    by the next questions in data order, dealt anew to the ranks, until every group is
    informative, `most` further rounds are over, or every question has been asked in this
    step. A group that nothing replaced stays, with advantages of 0;
    `algo.advantage.drop_uniform_groups` decides whether its tokens count in the loss's
    denominators. Deviates from DAPO, which throws surplus informative groups away: no more
    questions are asked than places are free.

    All ranks play equally often, some perhaps nothing: engines over several ranks need that.
    """

    def __init__(
        self, questions: Questions, *, most: int, on_close: Callable[[], None] = lambda: None
    ) -> None:
        self._questions = questions
        self._most = most
        self._on_close = on_close

    def __call__(self, step: int) -> Rolled:
        """This rank's groups; called by all ranks together."""
        free = list(range(self._questions.per_step))
        asked: list[int] = []
        held: dict[int, Group] = {}
        replaced: list[Group] = []
        rounds = 0
        while free and rounds <= self._most:
            drawn = self._draw(len(free), asked)
            if not drawn:
                break
            asked += drawn
            rounds += 1
            taken = dict(zip(free, drawn, strict=False))
            replaced += [held.pop(position) for position in taken if position in held]
            played = self._questions.ask(self._questions.share(taken), step)
            held |= played
            uniform = _everywhere([p for p, group in played.items() if not is_informative(group)])
            free = sorted({*free[len(drawn) :], *uniform})
        positions = sorted(held)
        return Rolled(
            groups=[held[position] for position in positions],
            questions=positions,
            replaced=replaced,
            metrics={
                "rollout/rounds": float(rounds),
                "rollout/groups_played": float(len(asked)),
                "rollout/groups_informative": float(self._questions.per_step - len(free)),
            },
        )

    def close(self) -> None:
        """Nothing is under way between two steps; what plays ends."""
        self._on_close()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: nothing is left over between two steps."""
        return {}

    def load_state_dict(self, state: JsonObject) -> None:
        """What a run of another kind left over is dropped: it comes again in the next epoch."""

    def _draw(self, wanted: int, asked: Sequence[int]) -> list[int]:
        """Up to `wanted` questions that were not asked in this step."""
        order = self._questions.order
        num = min(wanted, order.num_tasks - len(asked)) if asked else wanted
        return order.next_batch(num, exclude=asked) if num else []


def is_informative(group: Group) -> bool:
    """Whether the usable trajectories of a scored group earned different rewards."""
    earned = {t.scored().total for t in group.trajectories if not t.failed_outside_policy}
    return len(earned) > 1


def _everywhere(positions: Sequence[int]) -> list[int]:
    """The positions of all ranks."""
    ranks = distributed.all_gather_objects(list(positions))
    return [position for rank in ranks for position in rank]
