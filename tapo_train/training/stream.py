"""Questions to groups without steps that wait: what an update trains, and what goes on meanwhile.

    order ─ draw ─▶ waiting ─ begin ─▶ under way ─▶ complete ─ take, oldest first ─▶ update
                    └──────── untrained: (S + 1) · B at most ────────┘

Every rank draws the same questions and plays its share of them, whole groups each, and trains as
many of its own in every update: until an update begins, ranks have nothing to tell each other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tapo_train.data.sampler import TaskSampler, shard
from tapo_train.errors import DataError
from tapo_train.learner import distributed
from tapo_train.training.admission import Admission
from tapo_train.training.ages import ages, staleness
from tapo_train.training.interruption import Interruption, StepGivenUp
from tapo_train.training.parts import Play, Rolled
from tapo_train.types import Group, JsonObject, Task

__all__ = ["AtOnce", "GroupsUnderWay", "Stream"]

OnComplete = Callable[[int, Group], None]


class GroupsUnderWay(Protocol):
    """Plays this rank's groups by number; see `rollout.stream.GroupStream`."""

    def begin(self, number: int, task: Task, *, version: int, on_complete: OnComplete) -> None:
        """Have a group begin. Any thread."""
        ...

    def wait(self, enough: Callable[[], bool], *, version: int) -> None:
        """Until `enough`; raises what ended a group or the engine."""
        ...

    def close(self) -> None:
        """Drop what is under way."""
        ...


class AtOnce:
    """Plays what has begun when it is waited for: for engines that ranks share, in lockstep."""

    def __init__(self, play: Play, *, rollouts: int) -> None:
        self._play = play
        self._rollouts = rollouts
        self._begun: list[tuple[int, Task, OnComplete]] = []

    def begin(self, number: int, task: Task, *, version: int, on_complete: OnComplete) -> None:
        """See `GroupsUnderWay.begin`."""
        self._begun.append((number, task, on_complete))

    def wait(self, enough: Callable[[], bool], *, version: int) -> None:
        """See `GroupsUnderWay.wait`. Called by all ranks together."""
        begun, self._begun = self._begun, []
        tasks = [task for _, task, _ in begun]
        groups = self._play(tasks, rollouts=self._rollouts, greedy=False, policy_version=version)
        for (number, _, on_complete), group in zip(begun, groups, strict=True):
            on_complete(number, group)

    def close(self) -> None:
        """See `GroupsUnderWay.close`: nothing is under way between two waits."""


class Stream:
    """The `Rounds` protocol over groups that stay under way.

    What is untrained when a checkpoint is written is asked anew by a resumed run, with the weights
    it has then: no question is lost, and no trajectory is trained twice.

    Args:
        per_step: questions of an update, over all ranks.
        max_staleness: most versions between a group's beginning and its update.
        active: most groups under way over all ranks; None: as many as `max_staleness` admits.
        steps: of the run; what no update would train is not begun.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        order: TaskSampler,
        groups: GroupsUnderWay,
        interruption: Interruption,
        *,
        per_step: int,
        max_staleness: int,
        active: int | None,
        steps: int,
    ) -> None:
        self._tasks = tasks
        self._order = order
        self._groups = groups
        self._interruption = interruption
        self._per_step = per_step
        self._steps = steps
        self._guard = threading.Lock()
        self._admission = Admission(
            per_update=self._share(per_step),
            max_staleness=max_staleness,
            active=None if active is None else self._share(active),
        )
        self._untrained: list[int] = []
        """Tasks that were drawn, of all ranks, in the order they were drawn."""
        self._left: list[int] = []
        """Those of a run that was resumed, which are not dealt out yet."""
        self._mine: dict[int, int] = {}
        """Task of each group of this rank that was drawn and not trained, by number."""
        self._done: dict[int, Group] = {}
        self._next = 0

    def __call__(self, step: int) -> Rolled:
        """This rank's groups of an update; called by all ranks together.

        Raises:
            StepGivenUp: on all ranks, if one was asked to stop.
        """
        self._draw(step)
        waited = self._interruption.attempt(lambda: self._wait(step))
        if distributed.all_reduce_max(int(waited is None)):
            self.close()
            raise StepGivenUp
        return self._take(step)

    def close(self) -> None:
        """Drop what is under way."""
        self._groups.close()

    def state_dict(self) -> dict[str, Any]:
        """The ids of what is untrained, on all ranks."""
        return {"untrained": [self._tasks[index].id for index in self._untrained]}

    def load_state_dict(self, state: JsonObject) -> None:
        """Ask them first, but for those whose tasks are gone; DataError if one is there twice."""
        index_of = {task.id: index for index, task in enumerate(self._tasks)}
        found = state.get("untrained", [])
        if len(set(found)) < len(found):
            raise DataError("stream state: a question waits twice; wanted different ones")
        self._left = [index_of[id] for id in found if id in index_of]
        self._untrained = list(self._left)

    def _draw(self, step: int) -> None:
        """Deal out what may begin with the weights of `step`; the same on all ranks.

        A question that is untrained is not drawn again: two groups of it in one update would be
        taken for one.
        """
        ahead = min(self._admission.max_staleness + 1, self._steps - step)
        room = ahead * self._per_step - (len(self._untrained) - len(self._left))
        if (missing := room - len(self._left)) > 0:
            drawn = self._order.next_batch(missing, exclude=self._untrained)
            self._untrained += drawn
            self._left += drawn
        dealt, self._left = self._left[:room], self._left[room:]
        for start in range(0, len(dealt), self._per_step):
            batch = dealt[start : start + self._per_step]
            for index in shard(batch, distributed.rank(), distributed.world_size()):
                self._mine[self._next] = index
                with self._guard:
                    self._admission.draw(self._next)
                self._next += 1

    def _wait(self, step: int) -> bool:
        with self._guard:
            self._admission.version = step
            self._begin()
        self._groups.wait(self._is_ready, version=step)
        return True

    def _begin(self) -> None:
        """Have begin what may; the guard is held, so that the oldest begin first."""
        for number in self._admission.begin():
            self._groups.begin(
                number,
                self._tasks[self._mine[number]],
                version=self._admission.version,
                on_complete=self._complete,
            )

    def _complete(self, number: int, group: Group) -> None:
        with self._guard:
            self._done[number] = group
            self._admission.complete(number)
            self._begin()

    def _is_ready(self) -> bool:
        with self._guard:
            return self._admission.is_ready()

    def _take(self, step: int) -> Rolled:
        with self._guard:
            numbers = self._admission.take()
            groups = [self._done.pop(number) for number in numbers]
            own = [self._mine.pop(number) for number in numbers]
            under_way = self._admission.num_under_way
        ranks = distributed.all_gather_objects((own, under_way, ages(groups, step)))
        trained = {index for indices, _, _ in ranks for index in indices}
        self._untrained = [index for index in self._untrained if index not in trained]
        first, every = distributed.rank(), distributed.world_size()
        return Rolled(
            groups=groups,
            questions=[first + every * place for place in range(len(groups))],
            metrics={
                "rollout/groups_under_way": float(sum(number for _, number, _ in ranks)),
                **staleness([age for _, _, rank in ranks for age in rank]),
            },
        )

    def _share(self, number: int) -> int:
        """How many of `number` things that are dealt out this rank gets."""
        return len(range(distributed.rank(), number, distributed.world_size()))
