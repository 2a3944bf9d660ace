"""A stream over an engine, one update after another, without a learner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rewarding import scoring
from rollout_world import SYSTEM_PROMPT, draw_toolbox
from scripted_engine import ScriptedEngine

from tapo_train.data.sampler import TaskSampler
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.driver import EngineDriver
from tapo_train.rollout.engine import Engine, Sampling
from tapo_train.rollout.group import Rules
from tapo_train.rollout.limits import NEVER, Deadlines, Limits
from tapo_train.rollout.seats import Seats
from tapo_train.rollout.stream import GroupStream
from tapo_train.tools.toolbox import Toolbox
from tapo_train.training.interruption import Interruption
from tapo_train.training.parts import Rolled
from tapo_train.training.stream import Stream
from tapo_train.types import Task


def numbered(num: int) -> list[Task]:
    """Questions "0", "1", …"""
    return [Task(id=str(n), question="?", images=(), answers=("x",)) for n in range(num)]


def streamed(
    engine: Engine,
    *,
    staleness: int,
    per_step: int = 2,
    active: int | None = None,
    steps: int = 99,
    rollouts: int = 1,
    num_tasks: int = 40,
    apart: bool = False,
    deadlines: Deadlines = NEVER,
    tasks: Sequence[Task] | None = None,
    toolbox: Toolbox | None = None,
    max_in_flight: int | None = None,
    interruption: Interruption | None = None,
    chat: ChatFormat | None = None,
) -> Stream:
    """A stream; `apart`: the engine is stepped by a thread of its own.

    Args:
        chat: of the engine; a scripted one has its own.
    """
    if chat is None:
        assert isinstance(engine, ScriptedEngine)
        chat = engine.chat
    tasks = numbered(num_tasks) if tasks is None else tasks
    rules = Rules(
        chat=chat,
        toolbox=toolbox or draw_toolbox(),
        system_prompt=SYSTEM_PROMPT,
        rollouts=rollouts,
        limits=Limits(max_turns=6, max_turn_tokens=200, max_tokens=2000),
        sampling=Sampling(),
        deadlines=deadlines,
        score=scoring(form=0.0),
    )
    driver = EngineDriver(engine, end_token_id=chat.end_token_id)
    if apart:
        driver.start()
    return Stream(
        tasks,
        TaskSampler([task.id for task in tasks], seed=0, shuffle=False),
        GroupStream(rules, driver, seats=Seats(engine=engine), max_in_flight=max_in_flight),
        interruption or Interruption(),
        per_step=per_step,
        max_staleness=staleness,
        active=active,
        steps=steps,
    )


def trained(
    stream: Stream, steps: int, *, between: Callable[[int], Any] = lambda step: None
) -> list[Rolled]:
    """What each update trains; closes the stream.

    Args:
        between: what the learner does after the rollout of a step.
    """
    rolled = []
    try:
        for step in range(steps):
            rolled.append(stream(step))
            between(step)
    finally:
        stream.close()
    return rolled


def ids(rolled: Rolled) -> list[str]:
    """The questions of an update."""
    return [group.task.id for group in rolled.groups]
