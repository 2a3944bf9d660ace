"""Tasks → groups of trajectories: one thread, one engine, many episodes.

The engine is stepped by the event loop's own thread; between two steps the loop runs
whatever became ready, so a finished turn's tool works while other turns are decoded,
and the next turn is submitted as soon as its tool has answered. There is no barrier
between turns or between tasks.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

from tapo_train.errors import DataError
from tapo_train.rollout.agent import Episode, Limits
from tapo_train.rollout.chat import ChatFormat, Tokens
from tapo_train.rollout.driver import EngineDriver
from tapo_train.rollout.engine import Engine, Sampling
from tapo_train.tools.base import Toolbox
from tapo_train.types import Group, Task, Trajectory


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
) -> list[Group]:
    """Play every task `rollouts_per_task` times; groups come in the order of `tasks`.

    Args:
        max_in_flight: most episodes under way at a time (decoding or waiting for a tool).

    Raises:
        DataError: the prompt of a task leaves no room for an answer.
        RolloutError: the engine failed, or pictures and placeholders disagree.
    """
    schemas = toolbox.schemas()
    prompts = [
        chat.prompt(task, system_prompt=system_prompt, tool_schemas=schemas) for task in tasks
    ]
    for task, prompt in zip(tasks, prompts, strict=True):
        _require_room(task, prompt, limits)
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
        )

    async def play() -> list[Trajectory]:
        driver = EngineDriver(engine, end_token_id=chat.end_token_id)
        episodes = [
            episode(driver, position, rollout)
            for position in range(len(tasks))
            for rollout in range(rollouts_per_task)
        ]
        seats = asyncio.Semaphore(max_in_flight)
        return await _run_all(driver, episodes, seats, policy_version)

    played = asyncio.run(play()) if tasks else []
    return _grouped(tasks, played, rollouts_per_task)


async def _run_all(
    driver: EngineDriver, episodes: Sequence[Episode], seats: asyncio.Semaphore, version: int
) -> list[Trajectory]:
    """Run all episodes, as many at a time as there are seats; the first error ends them all."""

    async def attempt(episode: Episode) -> Trajectory:
        async with seats:
            return await episode.run(policy_version=version)

    together = asyncio.gather(*(attempt(episode) for episode in episodes))
    try:
        return await driver.drive(together)
    finally:
        together.cancel()
        await asyncio.gather(together, return_exceptions=True)


def _grouped(
    tasks: Sequence[Task], played: Sequence[Trajectory], rollouts_per_task: int
) -> list[Group]:
    """Trajectories in the order of their tasks, as groups."""
    return [
        Group(
            task=task,
            trajectories=tuple(
                played[position * rollouts_per_task : (position + 1) * rollouts_per_task]
            ),
        )
        for position, task in enumerate(tasks)
    ]


def _occurrences(ids: Sequence[str]) -> list[int]:
    """How often each id stood in the list before."""
    seen: Counter[str] = Counter()
    before = []
    for id in ids:
        before.append(seen[id])
        seen[id] += 1
    return before


def _require_room(task: Task, prompt: Tokens, limits: Limits) -> None:
    if len(prompt) >= limits.max_tokens:
        raise DataError(
            f"task {task.id}: its prompt has {len(prompt)} tokens; wanted fewer than "
            f"limits.max_tokens = {limits.max_tokens} (raise it, or use smaller pictures)"
        )
