"""A step's questions to groups: in one round, or in several until the batch is informative.

Positions in the global batch decide which update a group belongs to, so a question that
replaces another takes over its position, and neither draw nor positions depend on the
number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tapo_train.data.sampler import TaskSampler, shard
from tapo_train.errors import DataError
from tapo_train.learner import distributed
from tapo_train.training.interruption import Interruption, StepGivenUp
from tapo_train.training.parts import Play, Rolled
from tapo_train.types import Group, JsonObject, Task

__all__ = ["CarriedOver", "OneRound", "Questions", "Refill", "is_informative"]


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


class _Stateless:
    """Nothing is left over between two steps."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: JsonObject) -> None:
        """Whatever was left over is dropped: its questions come again in the next epoch."""


class OneRound(_Stateless):
    """Asks the next questions once, whatever comes of it."""

    def __init__(self, questions: Questions) -> None:
        self._questions = questions

    def __call__(self, step: int) -> Rolled:
        """This rank's groups; called by all ranks together."""
        questions = self._questions
        batch = questions.order.next_batch(questions.per_step)
        played = questions.ask(questions.share(dict(enumerate(batch))), step)
        return Rolled(groups=list(played.values()), questions=list(played))


class Refill(_Stateless):
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

    def __init__(self, questions: Questions, *, most: int) -> None:
        self._questions = questions
        self._most = most

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

    def _draw(self, wanted: int, asked: Sequence[int]) -> list[int]:
        """Up to `wanted` questions that were not asked in this step."""
        order = self._questions.order
        num = min(wanted, order.num_tasks - len(asked)) if asked else wanted
        return order.next_batch(num, exclude=asked) if num else []


class CarriedOver:
    """Groups that the step's deadline interrupted go on in the next step, with its weights.

    A group stays together, on its rank and at its position in the batch; it is trained in the
    step in which its last attempt ends, so advantages and credit always see the whole group.
    New questions are asked for the other positions only. A step in which no group at all
    became complete is played on; that ends because an attempt goes on a bounded number of
    times.

    Groups that wait are in memory. A checkpoint keeps their questions and positions: a resumed
    run asks them again from the start, so it is not the run that was never stopped. At the end
    of a run they are lost.
    """

    def __init__(self, questions: Questions) -> None:
        self._questions = questions
        self._waiting: dict[int, int] = {}
        self._mine: dict[int, int] = {}

    def __call__(self, step: int) -> Rolled:
        """This rank's complete groups; called by all ranks together."""
        questions, places = self._questions, self._waiting
        free = [position for position in range(questions.per_step) if position not in places]
        if free:
            drawn = questions.order.next_batch(len(free), exclude=list(places.values()))
            new = dict(zip(free, drawn, strict=True))
            self._mine |= questions.share(new)
            places = places | new
        complete: dict[int, Group] = {}
        while not _everywhere(list(complete)):
            played = questions.ask(self._mine, step)
            complete |= {p: group for p, group in played.items() if not group.waiting}
            self._mine = {p: index for p, index in self._mine.items() if p not in complete}
        self._waiting = {position: places[position] for position in _everywhere(list(self._mine))}
        positions = sorted(complete)
        groups = [complete[position] for position in positions]
        metrics = _staleness(groups, step) | {"rollout/groups_waiting": float(len(self._waiting))}
        return Rolled(groups=groups, questions=positions, metrics=metrics)

    def state_dict(self) -> dict[str, Any]:
        """The questions that wait, on all ranks, by position and task id."""
        tasks = self._questions.tasks
        return {"waiting": [[p, tasks[index].id] for p, index in sorted(self._waiting.items())]}

    def load_state_dict(self, state: JsonObject) -> None:
        """Ask them first, but for those whose tasks are gone. DataError at impossible positions."""
        index_of = {task.id: index for index, task in enumerate(self._questions.tasks)}
        waiting, most = state["waiting"], self._questions.per_step
        positions = [position for position, _ in waiting]
        if len(set(positions)) < len(positions) or not all(0 <= p < most for p in positions):
            raise DataError(
                f"rounds state: found questions waiting at positions {positions}; "
                f"wanted different positions below {most}"
            )
        places = {position: index_of[id] for position, id in waiting if id in index_of}
        self._waiting, self._mine = places, self._questions.share(places)


def _staleness(groups: Sequence[Group], step: int) -> dict[str, float]:
    """How many steps old the weights were that sampled the tokens of all ranks' groups."""
    turns = [turn for g in groups for t in g.trajectories for turn in t.turns]
    own = [(step - turn.policy_version, len(turn.span)) for turn in turns]
    ranks = distributed.all_gather_objects(own)
    ages = [pair for rank in ranks for pair in rank]
    tokens = sum(length for _, length in ages)
    return {
        "rollout/staleness": sum(age * length for age, length in ages) / max(tokens, 1),
        "rollout/staleness_max": float(max((age for age, _ in ages), default=0)),
    }


def is_informative(group: Group) -> bool:
    """Whether the usable trajectories of a scored group earned different rewards."""
    earned = {t.scored().total for t in group.trajectories if not t.failed_outside_policy}
    return len(earned) > 1


def _everywhere(positions: Sequence[int]) -> list[int]:
    """The positions of all ranks."""
    ranks = distributed.all_gather_objects(list(positions))
    return [position for rank in ranks for position in rank]
