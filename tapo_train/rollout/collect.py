"""Tasks → groups of trajectories: one engine, many episodes.

The calling thread steps the engine and does nothing else (`driver.py`); episodes are played on
an event loop in another thread, and tools work on theirs. So a finished turn's tool works while
other turns are decoded, and the next turn is submitted before the step that follows its tool's
answer. There is no barrier between turns or between tasks. `collect` plays some tasks to their
end; `stream.py` keeps groups under way from one update to the next.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence

from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.clock import PlayClock
from tapo_train.rollout.driver import EngineDriver
from tapo_train.rollout.engine import Engine, Sampling
from tapo_train.rollout.group import Field, Places, Rules, Score
from tapo_train.rollout.limits import NEVER, Deadlines, Limits
from tapo_train.tools.toolbox import Toolbox
from tapo_train.types import Group, Task


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
    score: Score | None = None,
    driver: EngineDriver | None = None,
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
        score: asked for each trajectory when its episode ends, while others are still played;
            None leaves trajectories without reward.
        driver: of the engine, where a thread of its own steps it; None makes one.
        on_progress: called when the engine has computed or a turn has ended.

    Raises:
        DataError: the prompt of a task leaves no room for an answer.
        RolloutError: the engine failed, or pictures and placeholders disagree.
    """
    rules = Rules(
        chat=chat,
        toolbox=toolbox,
        system_prompt=system_prompt,
        rollouts=rollouts_per_task,
        limits=limits,
        sampling=sampling,
        deadlines=deadlines,
        oversample=oversample,
        score=score,
    )
    prompts = [rules.prompt(task) for task in tasks]
    # Ids, and so the seeds of requests, depend on the task and not on its place in the
    # list: ranks that share a batch sample what one rank alone would have sampled.
    occurrence = _occurrences([task.id for task in tasks])

    async def play(driver: EngineDriver) -> list[Group]:
        field = Field(
            rules=rules,
            generate=driver.generate,
            places=Places(max_in_flight),
            clock=PlayClock(),
        )
        until = field.clock.now() + deadlines.step_s
        groups = [
            field.play(
                task,
                prompt,
                name=f"{task.id}/{policy_version}.{number}",
                policy_version=policy_version,
                until=until,
            )
            for task, prompt, number in zip(tasks, prompts, occurrence, strict=True)
        ]
        return await asyncio.gather(*groups)

    driver = driver or EngineDriver(engine, end_token_id=chat.end_token_id, on_progress=on_progress)
    with toolbox.settled():
        return driver.drive(play(driver)) if tasks else []


def _occurrences(ids: Sequence[str]) -> list[int]:
    """How often each id stood in the list before."""
    seen: Counter[str] = Counter()
    before = []
    for id in ids:
        before.append(seen[id])
        seen[id] += 1
    return before
