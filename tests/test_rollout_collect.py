"""Many episodes on one engine: order, overlap with tools, bounds, broken engines."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rollout_world import SYSTEM_PROMPT, draw_toolbox, picture_task
from scripted_engine import ScriptedEngine, turn_of

from tapo_train.errors import DataError, EngineError
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.collect import collect
from tapo_train.rollout.engine import Completion, Engine, Sampling
from tapo_train.rollout.limits import Limits
from tapo_train.types import Group, Task

ANSWER = "<answer>x</answer>"


@pytest.fixture(scope="module")
def chat(tiny_qwen3_vl: Path) -> ChatFormat:
    return ChatFormat(tiny_qwen3_vl)


def call(delay_s: float) -> str:
    arguments = f'{{"note": "n", "delay_s": {delay_s}}}'
    return f'<tool_call>{{"name": "draw", "arguments": {arguments}}}</tool_call>'


def run(
    engine: Engine,
    chat: ChatFormat,
    tasks: Sequence[Task],
    *,
    rollouts: int = 1,
    max_in_flight: int = 256,
    max_tokens: int = 2000,
) -> list[Group]:
    return collect(
        tasks,
        engine=engine,
        chat=chat,
        toolbox=draw_toolbox(),
        system_prompt=SYSTEM_PROMPT,
        rollouts_per_task=rollouts,
        limits=Limits(max_turns=6, max_turn_tokens=200, max_tokens=max_tokens),
        sampling=Sampling(),
        max_in_flight=max_in_flight,
    )


def test_groups_and_rollouts_come_in_order_whoever_finishes_first(chat: ChatFormat) -> None:
    def script(request: object) -> str:
        first = "a/0.0.0" in request.id  # type: ignore[attr-defined]
        return call(0.05) if first and turn_of(request) == 0 else ANSWER  # type: ignore[arg-type]

    tasks = [picture_task("a"), picture_task("b"), picture_task("a")]
    groups = run(ScriptedEngine(chat, script), chat, tasks, rollouts=2)
    assert [group.task.id for group in groups] == ["a", "b", "a"]
    ids = [trajectory.id for group in groups for trajectory in group.trajectories]
    assert ids == ["a/0.0.0", "a/0.0.1", "b/0.0.0", "b/0.0.1", "a/0.1.0", "a/0.1.1"]
    assert [len(trajectory.turns) for trajectory in groups[0].trajectories] == [2, 1]


def test_tools_of_different_trajectories_work_at_the_same_time(chat: ChatFormat) -> None:
    engine = ScriptedEngine(chat, lambda request: call(0.1) if turn_of(request) < 2 else ANSWER)
    started = time.perf_counter()
    run(engine, chat, [picture_task()], rollouts=16)
    elapsed = time.perf_counter() - started
    assert elapsed < 16 * 2 * 0.1 / 4, "one after the other they take 3.2 s, together 0.2 s"


def test_the_engine_goes_on_while_a_tool_works(chat: ChatFormat) -> None:
    """The others play all their turns while the first waits for its tool."""
    finished: list[str] = []

    def script(request: object) -> str:
        finished.append(request.id)  # type: ignore[attr-defined]
        turn = turn_of(request)  # type: ignore[arg-type]
        if request.id.startswith("task/0.0.0") and turn == 0:  # type: ignore[attr-defined]
            return call(0.5)
        return call(0.0) if turn < 3 else ANSWER

    run(ScriptedEngine(chat, script, steps=3), chat, [picture_task()], rollouts=4)
    assert finished.index("task/0.0.0:1") > finished.index("task/0.0.3:3")


def test_no_engine_step_is_spent_while_only_tools_work(chat: ChatFormat) -> None:
    engine = ScriptedEngine(
        chat, lambda request: call(0.1) if turn_of(request) < 2 else ANSWER, steps=2
    )
    run(engine, chat, [picture_task()])
    assert engine.num_steps == 3 * 2


def test_no_more_episodes_than_allowed_are_under_way(chat: ChatFormat) -> None:
    engine = ScriptedEngine(chat, lambda _: ANSWER, steps=3)
    run(engine, chat, [picture_task("a"), picture_task("b")], rollouts=5, max_in_flight=3)
    assert engine.most_in_flight == 3
    assert len(engine.requests) == 10


def test_the_history_is_neither_copied_nor_changed_between_turns(chat: ChatFormat) -> None:
    engine = ScriptedEngine(chat, lambda request: call(0) if turn_of(request) < 3 else ANSWER)
    ((group,),) = ([*run(engine, chat, [picture_task()])],)
    first = engine.requests[0].tokens
    for request in engine.requests:
        assert np.shares_memory(first, request.tokens)
        final = group.trajectories[0].tokens[: len(request.tokens)]
        np.testing.assert_array_equal(request.tokens, final)


def test_a_trajectory_keeps_no_more_memory_than_its_tokens(chat: ChatFormat) -> None:
    (group,) = run(ScriptedEngine(chat, lambda _: ANSWER), chat, [picture_task()])
    assert group.trajectories[0].tokens.base is None


def test_no_tasks_give_no_groups(chat: ChatFormat) -> None:
    assert run(ScriptedEngine(chat, lambda _: ANSWER), chat, []) == []


def test_a_prompt_without_room_for_an_answer_names_the_task(chat: ChatFormat) -> None:
    engine = ScriptedEngine(chat, lambda _: ANSWER)
    length = len(run(engine, chat, [picture_task()])[0].trajectories[0].turns[0].text)
    assert length
    prompt = engine.requests[0].tokens
    with pytest.raises(DataError, match=f"task long: its prompt has {len(prompt)} tokens"):
        run(engine, chat, [picture_task("long")], max_tokens=len(prompt))
    run(engine, chat, [picture_task("fits")], max_tokens=len(prompt) + 1)


class BrokenEngine(ScriptedEngine):
    """Breaks the protocol in a chosen way."""

    damage: Callable[[Completion], Completion]

    def step(self) -> list[Completion]:
        return [self.damage(completion) for completion in super().step()]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda c: replace(c, id="other"), "returned other, which nobody asked for"),
        (lambda c: replace(c, tokens=c.tokens[:-1], logprobs=c.logprobs[:-1]), "finished by"),
        (lambda c: replace(c, finished="length"), "finished by 'length'"),
        (lambda c: replace(c, logprobs=c.logprobs[1:]), "wanted equal numbers"),
        (lambda c: replace(c, tokens=c.tokens[:0], logprobs=c.logprobs[:0]), "0 tokens"),
        (lambda c: replace(c, logprobs=c.logprobs * np.float32(np.nan)), "not finite"),
    ],
)
def test_an_engine_that_breaks_the_protocol_stops_the_run(
    chat: ChatFormat, damage: Callable[[Completion], Completion], said: str
) -> None:
    engine = BrokenEngine(chat, lambda _: ANSWER)
    engine.damage = damage
    with pytest.raises(EngineError, match=said):
        run(engine, chat, [picture_task()], rollouts=2)
