"""Attempts at one task → a group: as many as are wanted, scored while others are played."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from tapo_train.errors import DataError
from tapo_train.rollout.agent import Episode, Generate
from tapo_train.rollout.chat import ChatFormat, Tokens
from tapo_train.rollout.clock import PlayClock
from tapo_train.rollout.engine import Sampling
from tapo_train.rollout.limits import NEVER, Deadlines, Limits
from tapo_train.tools.toolbox import Toolbox
from tapo_train.types import Group, Task, Trajectory

Score = Callable[[Trajectory], Awaitable[Trajectory]]
"""Gives a trajectory its reward, or the reason why it has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How a task is played; see `collect`."""

    chat: ChatFormat
    toolbox: Toolbox
    system_prompt: str
    rollouts: int
    limits: Limits
    sampling: Sampling
    deadlines: Deadlines = NEVER
    oversample: float = 1.0
    score: Score | None = None
    """None leaves trajectories without reward."""

    @property
    def started(self) -> int:
        """Attempts, spare ones included."""
        return math.ceil(round(self.rollouts * self.oversample, 9))  # 50 * 1.1 is 55, not 56

    def prompt(self, task: Task) -> Tokens:
        """[T] the tokens before the first turn; DataError if they leave no room for an answer."""
        schemas = self.toolbox.schemas()
        tokens = self.chat.prompt(task, system_prompt=self.system_prompt, tool_schemas=schemas)
        if len(tokens) >= self.limits.max_tokens:
            raise DataError(
                f"task {task.id}: its prompt has {len(tokens)} tokens; wanted fewer than "
                f"rollout.max_tokens = {self.limits.max_tokens} (raise it, or use smaller pictures)"
            )
        return tokens

    async def opened(self, task: Task, prompt: Tokens, trajectory: str) -> Tokens:
        """[T] of one attempt: the task's `prompt`, or with what its environment says at first."""
        said = await self.toolbox.open(trajectory, task)
        return self.prompt(replace(task, question=f"{task.question}\n{said}")) if said else prompt


class Places:
    """So many may be inside at a time; first come, first served. On one event loop."""

    def __init__(self, size: int) -> None:
        self._free = asyncio.Semaphore(size)
        self._size = size
        self._owed = 0
        """Places that the next to leave do not give back."""

    async def __aenter__(self) -> None:
        await self._free.acquire()

    async def __aexit__(self, *_: object) -> None:
        if self._owed > 0:
            self._owed -= 1
        else:
            self._free.release()

    def resize(self, size: int) -> None:
        """Have another number of places; whoever is inside stays."""
        self._owed -= size - self._size
        self._size = size
        while self._owed < 0:
            self._free.release()
            self._owed += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """Where groups are played, side by side; on one event loop."""

    rules: Rules
    generate: Generate
    places: Places
    """Of episodes under way."""
    clock: PlayClock

    async def play(
        self, task: Task, prompt: Tokens, *, name: str, policy_version: int, until: float
    ) -> Group:
        """The group of a task.

        Args:
            name: its attempts are `name.k`.
            policy_version: of the weights that are there at the beginning.
            until: when it has to be over, on the clock [s].
        """
        rewards = _Rewards(self.rules.score or _unscored)
        ids = [f"{name}.{rollout}" for rollout in range(self.rules.started)]

        async def attempt(id: str) -> Trajectory:
            async with self.places:
                episode = self._episode(task, await self.rules.opened(task, prompt, id), id)
                played = await episode.run(policy_version=policy_version, until=until)
            return rewards.begin(played)

        attempts = [asyncio.create_task(attempt(id)) for id in ids]
        try:
            kept, lost = await _first_usable(attempts, self.rules.rollouts)
            scored = tuple([await rewards.of(trajectory) for trajectory in kept])
        finally:
            await rewards.end()
            await self.rules.toolbox.end(ids)
        surplus = len(attempts) - len(kept)
        return Group(task=task, trajectories=scored, surplus=surplus, lost=lost)

    def _episode(self, task: Task, prompt: Tokens, id: str) -> Episode:
        rules = self.rules
        return Episode(
            id=id,
            task=task,
            prompt=prompt,
            generate=self.generate,
            chat=rules.chat,
            toolbox=rules.toolbox,
            limits=rules.limits,
            sampling=rules.sampling,
            deadlines=rules.deadlines,
            clock=self.clock,
        )


class _Rewards:
    """The rewards of a group's attempts, each asked for when its attempt ends."""

    def __init__(self, score: Score) -> None:
        self._score = score
        self._asked: dict[str, asyncio.Future[Trajectory]] = {}

    def begin(self, trajectory: Trajectory) -> Trajectory:
        """Ask; the trajectory as it is."""
        self._asked[trajectory.id] = asyncio.ensure_future(self._score(trajectory))
        return trajectory

    async def of(self, trajectory: Trajectory) -> Trajectory:
        """The trajectory with what was answered."""
        return await self._asked[trajectory.id]

    async def end(self) -> None:
        """Nobody waits any more for those that are not there."""
        for asked in self._asked.values():
            asked.cancel()
        await asyncio.gather(*self._asked.values(), return_exceptions=True)


async def _unscored(trajectory: Trajectory) -> Trajectory:
    return trajectory


async def _first_usable(
    attempts: Sequence[asyncio.Task[Trajectory]], wanted: int
) -> tuple[tuple[Trajectory, ...], tuple[Trajectory, ...]]:
    """The first `wanted` attempts to end usably, in the order they were started.

    What failed outside the policy fills the places that nothing better takes. The other
    attempts are cancelled; an error of one ends them all. Second, those that failed and got
    no place.
    """
    is_race = len(attempts) > wanted
    until = asyncio.FIRST_COMPLETED if is_race else asyncio.FIRST_EXCEPTION
    running, usable, failed = set(attempts), list[int](), list[int]()
    over: dict[int, Trajectory] = {}
    try:
        while running and len(usable) < wanted:
            done, running = await asyncio.wait(running, return_when=until)
            for number in sorted(map(attempts.index, done)):
                over[number] = attempts[number].result()
                (failed if over[number].failed_outside_policy else usable).append(number)
    finally:
        for attempt in running:
            attempt.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    placed = sorted((usable + failed)[:wanted])
    kept = tuple(over[number] for number in placed)
    return kept, tuple(over[number] for number in failed if number not in placed)
