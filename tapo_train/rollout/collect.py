"""Tasks → groups of trajectories: one engine, many episodes.

The calling thread steps the engine and does nothing else (`driver.py`); episodes are played on
an event loop in another thread, and tools work on theirs. So a finished turn's tool works while
other turns are decoded, and the next turn is submitted before the step that follows its tool's
answer. There is no barrier between turns or between tasks.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from tapo_train.errors import DataError
from tapo_train.rollout.agent import Episode, Generate
from tapo_train.rollout.carry_over import Attempt, CarryOver
from tapo_train.rollout.chat import ChatFormat, Tokens
from tapo_train.rollout.driver import EngineDriver
from tapo_train.rollout.engine import Engine, Sampling
from tapo_train.rollout.limits import NEVER, Deadlines, Limits
from tapo_train.tools.toolbox import Toolbox
from tapo_train.types import Group, Task, Trajectory

Score = Callable[[Trajectory], Awaitable[Trajectory]]
"""Gives a trajectory its reward, or the reason why it has none."""


def collect(
    tasks: Sequence[Task],
    *,
    engine: Engine,
    chat: ChatFormat,
    toolbox: Toolbox,
    system_prompt: str,
    rollouts_per_task: int,
    limits: Limits,
    sampling: Sampling,
    policy_version: int = 0,
    max_in_flight: int = 256,
    deadlines: Deadlines = NEVER,
    oversample: float = 1.0,
    carry_over: CarryOver | None = None,
    score: Score | None = None,
    on_progress: Callable[[], None] = lambda: None,
) -> list[Group]:
    """Play every task `rollouts_per_task` times; groups come in the order of `tasks`.

    Args:
        max_in_flight: most episodes under way at a time (decoding or waiting for a tool).
        oversample: starts this many times the attempts (rounded up) and keeps the first of
            each task to finish; the others are aborted. The engine is then never idle for
            the last few long attempts, and an attempt that failed outside the policy is
            replaced. But whoever finishes first is short: long trajectories and slow tools
            are seen less often than the policy plays them, so it learns to be brief.
        carry_over: what goes on instead of being cut by `deadlines.step_s`. A group with an
            attempt that goes on waits as a whole: it comes without trajectories, and is gone
            on with when its task is asked again. The spare attempts of a group (`oversample`)
            wait with it; those of a group that is complete are dropped.
        score: asked for each trajectory when its episode ends, while others are still played;
            None leaves trajectories without reward.
        on_progress: called when the engine has computed or a turn has ended.

    Raises:
        DataError: the prompt of a task leaves no room for an answer.
        RolloutError: the engine failed, or pictures and placeholders disagree.
    """
    schemas = toolbox.schemas()
    prompts = [chat.prompt(t, system_prompt=system_prompt, tool_schemas=schemas) for t in tasks]
    _require_room(tasks, prompts, limits)
    # Ids, and so the seeds of requests, depend on the task and not on its place in the
    # list: ranks that share a batch sample what one rank alone would have sampled.
    occurrence = _occurrences([task.id for task in tasks])

    def episode(driver: EngineDriver, position: int, rollout: int) -> Episode:
        task = tasks[position]
        return Episode(
            id=f"{task.id}/{policy_version}.{occurrence[position]}.{rollout}",
            task=task,
            prompt=prompts[position],
            generate=driver.generate,
            chat=chat,
            toolbox=toolbox,
            limits=limits,
            sampling=sampling,
            deadlines=deadlines,
        )

    async def play(driver: EngineDriver) -> list[Group]:
        groups = _Groups(
            begin=partial(episode, driver),
            generate=driver.generate,
            policy_version=policy_version,
            until=asyncio.get_running_loop().time() + deadlines.step_s,
            seats=asyncio.Semaphore(max_in_flight),
            rollouts=rollouts_per_task,
            started=math.ceil(round(rollouts_per_task * oversample, 9)),  # 50 * 1.1 is 55, not 56
            carry_over=carry_over,
            score=score or _unscored,
        )
        return await asyncio.gather(*map(groups.play, range(len(tasks)), tasks))

    driver = EngineDriver(engine, end_token_id=chat.end_token_id, on_progress=on_progress)
    with toolbox.settled():
        return driver.drive(play(driver)) if tasks else []


@dataclass(frozen=True, slots=True, kw_only=True)
class _Groups:
    """How attempts at tasks become groups, within one call of `collect`."""

    begin: Callable[[int, int], Episode]
    """A new episode of (position of the task, number of the rollout)."""
    generate: Generate
    policy_version: int
    until: float
    """When the step's time is up, on the event loop's clock [s]."""
    seats: asyncio.Semaphore
    rollouts: int
    started: int
    """Attempts, spare ones included."""
    carry_over: CarryOver | None
    score: Score

    async def play(self, position: int, task: Task) -> Group:
        """The group of a task, or that it waits."""
        waited = self.carry_over.take(task.id) if self.carry_over else []
        begun: Sequence[Attempt | None] = waited or [None] * self.started
        rewards = _Rewards(self.score)
        attempts = [
            asyncio.create_task(self._attempt(position, *numbered, rewards))
            for numbered in enumerate(begun)
        ]
        try:
            kept, lost, interrupted = await _first_usable(attempts, self.rollouts)
            if self.carry_over and interrupted:
                rested = [await rewards.of(attempt.result()) for attempt in attempts]
                self.carry_over.keep(task.id, rested)
                return Group(task=task, trajectories=(), waiting=interrupted)
            scored = tuple([await rewards.of_trajectory(trajectory) for trajectory in kept])
        finally:
            await rewards.end()
        surplus = len(attempts) - len(kept)
        return Group(task=task, trajectories=scored, surplus=surplus, lost=lost)

    async def _attempt(
        self, position: int, rollout: int, begun: Attempt | None, rewards: _Rewards
    ) -> Attempt:
        if isinstance(begun, Trajectory):
            return rewards.begin(begun)
        async with self.seats:
            episode = begun or self.begin(position, rollout)
            episode.move_to(self.generate)
            is_over = await episode.advance(policy_version=self.policy_version, until=self.until)
        most = self.carry_over.most if self.carry_over else 0
        if is_over or episode.interruptions > most:
            return rewards.begin(episode.trajectory())
        return episode


class _Rewards:
    """The rewards of a group's attempts, each asked for when its attempt ends."""

    def __init__(self, score: Score) -> None:
        self._score = score
        self._asked: dict[str, asyncio.Future[Trajectory]] = {}

    def begin(self, trajectory: Trajectory) -> Trajectory:
        """Ask; the trajectory as it is."""
        self._asked[trajectory.id] = asyncio.ensure_future(self._score(trajectory))
        return trajectory

    async def of_trajectory(self, trajectory: Trajectory) -> Trajectory:
        """The trajectory with what was answered."""
        return await self._asked[trajectory.id]

    async def of(self, attempt: Attempt) -> Attempt:
        """As `of_trajectory`; an episode that goes on has no reward yet."""
        return await self.of_trajectory(attempt) if isinstance(attempt, Trajectory) else attempt

    async def end(self) -> None:
        """Nobody waits any more for those that are not there."""
        for asked in self._asked.values():
            asked.cancel()
        await asyncio.gather(*self._asked.values(), return_exceptions=True)


async def _unscored(trajectory: Trajectory) -> Trajectory:
    return trajectory


async def _first_usable(
    attempts: Sequence[asyncio.Task[Attempt]], wanted: int
) -> tuple[tuple[Trajectory, ...], tuple[Trajectory, ...], int]:
    """The first `wanted` attempts to end usably, in the order they were started.

    What failed outside the policy fills the places that nothing better takes. The other
    attempts are cancelled; an error of one ends them all. Second, those that failed and got
    no place. Third, how many were interrupted that are needed; all have come to rest then.
    """
    is_race = len(attempts) > wanted
    until = asyncio.FIRST_COMPLETED if is_race else asyncio.FIRST_EXCEPTION
    running, usable, failed = set(attempts), list[int](), list[int]()
    over: dict[int, Trajectory] = {}
    try:
        while running and len(usable) < wanted:
            done, running = await asyncio.wait(running, return_when=until)
            for number in sorted(map(attempts.index, done)):
                result = attempts[number].result()
                if isinstance(result, Trajectory):
                    over[number] = result
                    (failed if result.failed_outside_policy else usable).append(number)
    finally:
        for attempt in running:
            attempt.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    interrupted = len(attempts) - len(over) if len(usable) < wanted else 0
    placed = sorted((usable + failed)[:wanted])
    kept = tuple(over[number] for number in placed)
    return kept, tuple(over[number] for number in failed if number not in placed), interrupted


def _occurrences(ids: Sequence[str]) -> list[int]:
    """How often each id stood in the list before."""
    seen: Counter[str] = Counter()
    before = []
    for id in ids:
        before.append(seen[id])
        seen[id] += 1
    return before


def _require_room(tasks: Sequence[Task], prompts: Sequence[Tokens], limits: Limits) -> None:
    for task, prompt in zip(tasks, prompts, strict=True):
        if len(prompt) >= limits.max_tokens:
            raise DataError(
                f"task {task.id}: its prompt has {len(prompt)} tokens; wanted fewer than "
                f"rollout.max_tokens = {limits.max_tokens} (raise it, or use smaller pictures)"
            )
