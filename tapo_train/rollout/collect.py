"""Tasks → groups of trajectories: one thread, one engine, many episodes.

The engine is stepped by the event loop's own thread; between two steps the loop runs
whatever became ready, so a finished turn's tool works while other turns are decoded,
and the next turn is submitted as soon as its tool has answered. There is no barrier
between turns or between tasks.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Sequence

from tapo_train.errors import DataError
from tapo_train.rollout.agent import Episode
from tapo_train.rollout.chat import ChatFormat, Tokens
from tapo_train.rollout.driver import EngineDriver
from tapo_train.rollout.engine import Engine, Sampling
from tapo_train.rollout.limits import NEVER, Deadlines, Limits
from tapo_train.tools.base import Toolbox
from tapo_train.types import Group, Task, Trajectory

Attempt = asyncio.Task[Trajectory]


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

    async def play() -> list[Group]:
        driver = EngineDriver(engine, end_token_id=chat.end_token_id, on_progress=on_progress)
        seats = asyncio.Semaphore(max_in_flight)
        until = asyncio.get_running_loop().time() + deadlines.step_s

        async def attempt(position: int, rollout: int) -> Trajectory:
            async with seats:
                playing = episode(driver, position, rollout)
                return await playing.run(policy_version=policy_version, until=until)

        async def group(position: int) -> Group:
            started = range(math.ceil(rollouts_per_task * oversample))
            attempts = [asyncio.create_task(attempt(position, rollout)) for rollout in started]
            kept = await _first_usable(attempts, rollouts_per_task)
            return Group(task=tasks[position], trajectories=kept, surplus=len(attempts) - len(kept))

        return await driver.drive(asyncio.gather(*map(group, range(len(tasks)))))

    return asyncio.run(play()) if tasks else []


async def _first_usable(attempts: Sequence[Attempt], wanted: int) -> tuple[Trajectory, ...]:
    """The first `wanted` attempts to end usably, in the order they were started.

    What failed outside the policy fills the places that nothing better takes. The other
    attempts are cancelled; an error of one ends them all.
    """
    is_race = len(attempts) > wanted
    until = asyncio.FIRST_COMPLETED if is_race else asyncio.FIRST_EXCEPTION
    running, usable, failed = set(attempts), list[Attempt](), list[Attempt]()
    try:
        while running and len(usable) < wanted:
            done, running = await asyncio.wait(running, return_when=until)
            for attempt in sorted(done, key=attempts.index):
                (failed if attempt.result().failed_outside_policy else usable).append(attempt)
    finally:
        for attempt in running:
            attempt.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    kept = sorted((usable + failed)[:wanted], key=attempts.index)
    return tuple(attempt.result() for attempt in kept)


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
                f"limits.max_tokens = {limits.max_tokens} (raise it, or use smaller pictures)"
            )
