"""Stateful environments: one instance per trajectory, closed whatever happens."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from rollout_world import SYSTEM_PROMPT
from scripted_engine import ScriptedEngine, turn_of

from tapo_train.build.custom import require_custom_parts
from tapo_train.build.reward import build_scoring
from tapo_train.build.tools import build_toolbox
from tapo_train.errors import ConfigError
from tapo_train.recipe.compose import load_recipe
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.collect import Score, collect
from tapo_train.rollout.engine import GenerationRequest, Sampling
from tapo_train.rollout.limits import Limits
from tapo_train.tools.environment import Environments
from tapo_train.tools.toolbox import Toolbox
from tapo_train.types import Outcome, StopReason, Task, Trajectory

ROOT = Path(__file__).resolve().parent.parent
EVENTS: list[tuple[str, Any]] = []
TASK = Task(id="t", question="Count.", images=(), answers=("3",), metadata={"step": 2})


@pytest.fixture(scope="module")
def chat(tiny_qwen3_vl: Path) -> ChatFormat:
    return ChatFormat(tiny_qwen3_vl)


@pytest.fixture(autouse=True)
def no_events() -> Iterator[None]:
    EVENTS.clear()
    yield
    EVENTS.clear()


class Counter:
    """Counts what it is told to, and notes what happens to it."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.total = 0

    def reset(self, *, step: int, prompt: str, **row: Any) -> str | None:
        if self.fails == "reset":
            raise RuntimeError("no seat left")
        self.step = step
        EVENTS.append(("reset", prompt))
        return "By twos." if step == 2 else None

    def add(self, times: int) -> str:
        """Add the step so many times.

        Args:
            times: at least 1
        """
        if times < 1:
            raise ValueError("times is at least 1")
        if self.fails == "add":
            raise KeyError("a bug")
        before = self.total
        time.sleep(0.02)
        self.total = before + times * self.step
        return f"total {self.total}"

    @property
    def reward(self) -> float:
        return self.total / 10

    def close(self) -> None:
        EVENTS.append(("close", self.total))


def called(*times: int) -> str:
    calls = [json.dumps({"name": "add", "arguments": {"times": number}}) for number in times]
    return "".join(f"<tool_call>{call}</tool_call>" for call in calls)


def play(
    chat: ChatFormat,
    script: Callable[[GenerationRequest], str],
    *,
    fails: str = "",
    rollouts: int = 1,
    oversample: float = 1.0,
    max_tokens: int = 1000,
) -> tuple[list[Trajectory], list[float]]:
    """Trajectories, and what their environments held when they were scored."""
    box = Toolbox([], deadline_s=5.0, environments=Environments(lambda: Counter(fails)))
    states: list[float] = []

    async def score(trajectory: Trajectory) -> Trajectory:
        assert box.environments is not None
        if not trajectory.failed_outside_policy:
            states.append(box.environments.state(trajectory, "reward"))
        return trajectory

    (group,) = collect(
        [TASK],
        engine=ScriptedEngine(chat, script),
        chat=chat,
        toolbox=box,
        system_prompt=SYSTEM_PROMPT,
        rollouts_per_task=rollouts,
        limits=Limits(
            max_turns=4, max_turn_tokens=200, max_tokens=max_tokens, max_parallel_calls=2
        ),
        sampling=Sampling(),
        oversample=oversample,
        score=score,
    )
    return list(group.trajectories), states


def test_each_trajectory_has_a_state_of_its_own_that_its_calls_change(chat: ChatFormat) -> None:
    def script(request: GenerationRequest) -> str:
        number = int(request.id.partition(":")[0].rpartition(".")[2])
        return called(1 + number, 1 + number) if turn_of(request) < 2 else "<answer>3</answer>"

    found, states = play(chat, script, rollouts=2)
    # Two equal calls of a turn are two calls, one after the other; steps are 2 each.
    assert sorted(states) == [0.8, 1.6]
    texts = [
        call.observation.text for t in found for turn in t.turns for call in turn.calls
        if call.observation
    ]  # fmt: skip
    assert sorted(texts[:2]) == ["total 2", "total 4"] and sorted(texts[4:6]) == [
        "total 4", "total 8",
    ]  # fmt: skip
    prompt = chat.decode(found[0].tokens[: found[0].prompt_length]).text
    assert "Count.\nBy twos." in prompt
    assert found[0].task == TASK
    wanted = [("close", 0), ("close", 8), ("close", 16), *[("reset", "Count.")] * 2]
    assert sorted(map(str, EVENTS)) == sorted(map(str, wanted))


def test_a_value_error_is_read_by_the_policy_and_a_bug_ends_the_trajectory(
    chat: ChatFormat,
) -> None:
    def script(request: GenerationRequest) -> str:
        return called(0) if turn_of(request) == 0 else "<answer>3</answer>"

    ((read,), _) = play(chat, script)
    (call,) = read.turns[0].calls
    assert call.outcome is Outcome.MODEL_ERROR and read.stop is StopReason.ANSWER
    assert call.observation is not None and "times is at least 1" in call.observation.text
    ((broken,), _) = play(chat, lambda request: called(1), fails="add")
    assert broken.stop is StopReason.INFRA
    assert EVENTS.count(("close", 0)) == 4  # two trajectories, and two looked at for their tools


def test_an_instance_that_cannot_be_reset_ends_its_trajectory_at_the_first_call(
    chat: ChatFormat,
) -> None:
    ((found,), states) = play(chat, lambda request: called(1), fails="reset")
    (call,) = found.turns[0].calls
    assert found.stop is StopReason.INFRA and states == []
    assert call.observation is not None
    assert "its reset failed: RuntimeError: no seat left" in call.observation.text
    assert ("close", 0) in EVENTS[1:]


def test_what_is_given_up_is_closed_too(chat: ChatFormat) -> None:
    def script(request: GenerationRequest) -> str:
        return "<answer>3</answer>" if ".0:" in request.id else called(1)

    found, _ = play(chat, script, rollouts=1, oversample=3.0)
    assert [t.stop for t in found] == [StopReason.ANSWER]
    resets = sum(name == "reset" for name, _ in EVENTS)
    closed = sum(name == "close" for name, _ in EVENTS)
    assert resets == 3 and closed == 4


def test_an_error_that_ends_the_rollout_leaves_nothing_open(chat: ChatFormat) -> None:
    def script(request: GenerationRequest) -> str:
        raise OSError("the engine is gone")

    with pytest.raises(OSError, match="the engine is gone"):
        play(chat, script, rollouts=2)
    assert sum(name == "close" for name, _ in EVENTS) == 3


def test_a_class_without_reset_or_methods_is_refused() -> None:
    class Empty:
        def reset(self, **row: Any) -> None: ...

    with pytest.raises(ConfigError, match="has no public method"):
        Environments(Empty)
    with pytest.raises(ConfigError, match=r"has no reset"):
        Environments(object)


def test_an_environment_of_ones_own_takes_two_lines_of_a_recipe(
    chat: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs" / "examples")
    two_lines = (
        "tools.environment=number_game:NumberGame",
        "reward.parts.accuracy={name: environment, attribute: reward}",
    )
    recipe = load_recipe(
        ROOT / "recipes" / "demo_cpu.yaml",
        ["tools.names=[]", "reward.parts.format=null", *two_lines],
    )
    require_custom_parts(recipe)
    box = build_toolbox(recipe)
    assert box.names == ("guess",)
    score: Score = build_scoring(recipe, box, ExitStack())

    def script(request: GenerationRequest) -> str:
        number = [50, 25, 37][min(turn_of(request), 2)]
        call = json.dumps({"name": "guess", "arguments": {"number": number}})
        is_over = "That is it." in chat.decode(request.tokens).text
        return "<answer>done</answer>" if is_over else f"<tool_call>{call}</tool_call>"

    (group,) = collect(
        [Task(id="n", question="Guess.", images=(), answers=("37",))],
        engine=ScriptedEngine(chat, script),
        chat=chat,
        toolbox=box,
        system_prompt="",
        rollouts_per_task=1,
        limits=Limits(max_turns=6, max_turn_tokens=200, max_tokens=1000),
        sampling=Sampling(),
        score=score,
    )
    assert group.trajectories[0].scored().accuracy == pytest.approx(1 / 3)


def test_a_recording_cannot_answer_for_a_state() -> None:
    with pytest.raises(ConfigError, match=r"tools\.replay: found 'replay', wanted off"):
        load_recipe(
            ROOT / "recipes" / "demo_cpu.yaml",
            ["tools.environment=number_game:NumberGame", "tools.replay=replay"],
        )


def test_an_instance_closed_while_it_is_reset_is_closed() -> None:
    class Slow(Counter):
        def reset(self, **row: Any) -> str:  # type: ignore[override]
            time.sleep(0.3)
            return ""

    environments = Environments(Slow, reset_s=0.05)

    async def open_and_end() -> str:
        said = await environments.open("a", TASK)
        await environments.end(["a"])
        return said

    assert asyncio.run(open_and_end()) == ""
    time.sleep(0.4)
    assert EVENTS.count(("close", 0)) >= 2
