"""An engine over two ranks: its leader plays, the other mirrors, both get their groups."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from process_environment import ROOT, environment
from rollout_world import SYSTEM_PROMPT, draw_toolbox, picture_task
from scripted_engine import ScriptedEngine, turn_of

from tapo_train.errors import ConfigError, DataError, EngineError
from tapo_train.recipe.compose import batch_arithmetic, load_recipe
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.collect import collect
from tapo_train.rollout.engine import Engine, GenerationRequest, Sampling
from tapo_train.rollout.limits import Limits
from tapo_train.rollout.tensor_parallel import GroupPlay, MirroredEngine
from tapo_train.types import Group, Task

WORKER = Path(__file__).with_name("tensor_parallel_worker.py")
CALL = '<tool_call>{"name": "draw", "arguments": {"delay_s": 0.02}}</tool_call>'
WAIT_S = 20.0


class Table:
    """Where threads that play ranks meet."""

    def __init__(self, size: int) -> None:
        self.values: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=WAIT_S)


@dataclass
class Seat:
    """The `Exchange` of one such thread."""

    table: Table
    index: int

    def gather(self, value: Any) -> list[Any]:
        self.table.values[self.index] = value
        self.table.barrier.wait()
        gathered = list(self.table.values)
        self.table.barrier.wait()
        return gathered

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]


@pytest.fixture(scope="module")
def chat(tiny_qwen3_vl: Path) -> ChatFormat:
    return ChatFormat(tiny_qwen3_vl)


def draws_twice(request: GenerationRequest) -> str:
    return CALL if turn_of(request) < 2 else f"<answer>{request.id}</answer>"


def play_with(
    engine: Engine,
    chat: ChatFormat,
    tasks: Sequence[Task],
    *,
    rollouts: int,
    greedy: bool,
    policy_version: int,
) -> list[Group]:
    assert not greedy
    return collect(
        tasks,
        engine=engine,
        chat=chat,
        toolbox=draw_toolbox(),
        system_prompt=SYSTEM_PROMPT,
        rollouts_per_task=rollouts,
        limits=Limits(max_turns=4, max_turn_tokens=200, max_tokens=4000),
        sampling=Sampling(),
        policy_version=policy_version,
    )


def on_ranks(work: Callable[[int], Any], ranks: int = 2) -> list[Any]:
    """What each rank returned or raised."""
    results: list[Any] = [None] * ranks

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    return results


def contents(groups: Sequence[Group]) -> list[tuple[object, ...]]:
    return [
        (t.id, t.answer, t.tokens.tolist(), t.policy_version)
        for group in groups
        for t in group.trajectories
    ]


def test_each_rank_gets_the_groups_of_its_tasks_and_the_engines_did_the_same(
    chat: ChatFormat,
) -> None:
    table = Table(2)
    engines = [ScriptedEngine(chat, draws_twice, steps=3) for _ in range(2)]
    tasks = [[picture_task("a"), picture_task("b"), picture_task("c")], [picture_task("d")]]

    def rank(index: int) -> list[Group]:
        mirrored = MirroredEngine(engines[index], Seat(table, index))
        play = GroupPlay(partial(play_with, mirrored, chat), mirrored)
        first = play(tasks[index], rollouts=2, greedy=False, policy_version=4)
        return first + play(tasks[index][:1], rollouts=1, greedy=False, policy_version=5)

    found = on_ranks(rank)
    for index in range(2):
        alone = partial(play_with, ScriptedEngine(chat, draws_twice, steps=3), chat)
        expected = alone(tasks[index], rollouts=2, greedy=False, policy_version=4)
        expected += alone(tasks[index][:1], rollouts=1, greedy=False, policy_version=5)
        assert contents(found[index]) == contents(expected)
    leader, follower = engines
    assert [r.id for r in leader.requests] == [r.id for r in follower.requests]
    assert len(leader.requests) == 3 * (2 * 4 + 2)
    assert leader.num_steps == follower.num_steps > 0
    assert not follower.has_unfinished()


def test_an_aborted_request_is_aborted_everywhere_in_order(chat: ChatFormat) -> None:
    table = Table(2)
    engines = [ScriptedEngine(chat, draws_twice, steps=2) for _ in range(2)]
    request = GenerationRequest(
        id="t:0", tokens=chat.plain("hi"), images=(), max_tokens=50, sampling=Sampling()
    )

    def rank(index: int) -> int:
        mirrored = MirroredEngine(engines[index], Seat(table, index))
        if index == 1:
            mirrored.follow()
            return engines[1].num_steps
        with mirrored.leading():
            mirrored.submit(request)
            mirrored.step()
            mirrored.abort(["t:0"])
            mirrored.submit(request)
            mirrored.step()
            mirrored.abort(["t:0"])
        return engines[0].num_steps

    assert on_ranks(rank) == [2, 2]
    assert not engines[1].has_unfinished()
    assert [r.id for r in engines[1].requests] == ["t:0", "t:0"]


def test_the_others_hear_of_a_failure_of_their_leader(chat: ChatFormat) -> None:
    table = Table(2)

    def fails(*_: object, **__: object) -> list[Group]:
        raise DataError("a prompt is too long")

    def rank(index: int) -> list[Group]:
        mirrored = MirroredEngine(ScriptedEngine(chat, draws_twice), Seat(table, index))
        play = GroupPlay(fails, mirrored)
        return play([picture_task()], rollouts=1, greedy=False, policy_version=0)

    leader, follower = on_ranks(rank)
    assert isinstance(leader, DataError)
    assert isinstance(follower, EngineError) and "its message says why" in str(follower)


def test_an_engine_over_ranks_that_are_not_there_is_refused() -> None:
    recipe = load_recipe(ROOT / "recipes/demo_cpu.yaml", ["rollout.engine.tensor_parallel=3"])
    with pytest.raises(ConfigError, match="tensor_parallel: found 3 on 2 ranks, wanted a divisor"):
        batch_arithmetic(recipe, 2)
    assert "trajectories" in batch_arithmetic(
        load_recipe(ROOT / "recipes/demo_cpu.yaml", ["data.questions_per_step=6"]), 3
    )


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_vllm_over_two_ranks_plays_the_greedy_trajectories_of_one(
    tiny_qwen3_vl: Path, tmp_path: Path
) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node=2", str(WORKER), str(tiny_qwen3_vl), str(tmp_path)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.count("agreed") == 2, done.stdout + done.stderr[-4000:]
