"""Attempts that the step's deadline interrupts go on in the next step; their group waits."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from process_environment import ROOT
from rewarding import scoring
from scripted_engine import ScriptedEngine, turn_of
from test_outcomes import trainer as outcome_trainer
from test_rollout_deadlines import ANSWER, SilentEngine, call, rollout_of
from test_rollout_deadlines import play as play_group

from tapo_train.data.sampler import TaskSampler
from tapo_train.errors import ConfigError, DataError
from tapo_train.recipe.compose import load_recipe
from tapo_train.rollout.carry_over import CarryOver
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.engine import GenerationRequest
from tapo_train.rollout.limits import NEVER, Deadlines
from tapo_train.training.interruption import Interruption
from tapo_train.training.parts import Parts, Schedule
from tapo_train.training.rounds import CarriedOver, Questions
from tapo_train.training.trainer import Trainer
from tapo_train.types import Group, Span, StopReason, Task, Trajectory, Turn

STEP = Deadlines(step_s=0.3)


@pytest.fixture(scope="module")
def chat(tiny_qwen3_vl: Path) -> ChatFormat:
    return ChatFormat(tiny_qwen3_vl)


def three_calls(request: GenerationRequest) -> str:
    return call(0) if turn_of(request) < 3 else ANSWER


def play(
    engine: ScriptedEngine,
    carry_over: CarryOver | None,
    *,
    version: int,
    deadlines: Deadlines = STEP,
    rollouts: int = 1,
    oversample: float = 1.0,
) -> Group:
    group = play_group(
        engine,
        deadlines=deadlines,
        rollouts=rollouts,
        oversample=oversample,
        policy_version=version,
        carry_over=carry_over,
        score=scoring(form=0.0),
    )
    assert not engine.has_unfinished()
    return group


def versions(trajectory: Trajectory) -> list[int]:
    return [turn.policy_version for turn in trajectory.turns]


def same_but_for_versions(ours: Trajectory, theirs: Trajectory) -> None:
    """Tokens, log-probabilities, spans and pictures agree."""
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_array_equal(ours.logprobs, theirs.logprobs)
    assert [replace(t, policy_version=0, calls=()) for t in ours.turns] == [
        replace(t, policy_version=0, calls=()) for t in theirs.turns
    ]
    assert ours.images == theirs.images
    assert (ours.stop, ours.answer) == (theirs.stop, theirs.answer)


def test_a_turn_that_was_being_sampled_is_sampled_by_the_next_weights(chat: ChatFormat) -> None:
    carry_over = CarryOver(most=1)
    engine = SilentEngine(chat, three_calls)
    engine.silent = ("task/0.0.0:2",)
    waiting = play(engine, carry_over, version=0)
    assert (waiting.trajectories, waiting.waiting, waiting.surplus) == ((), 1, 0)
    assert engine.aborted == ["task/0.0.0:2"]
    begun = len(engine.requests)
    (trajectory,) = play(engine, carry_over, version=1).trajectories
    assert versions(trajectory) == [0, 0, 1, 1]
    assert (trajectory.id, trajectory.policy_version) == ("task/0.0.0", 1)
    asked = [request.id for request in engine.requests[begun:]]
    assert asked == ["task/0.0.0~1:2", "task/0.0.0~1:3"], "other numbers are drawn"
    whole = play(ScriptedEngine(chat, three_calls), None, version=0, deadlines=NEVER)
    same_but_for_versions(trajectory, whole.trajectories[0])
    assert play(engine, carry_over, version=2).trajectories[0].id == "task/2.0.0", "not held"


def test_tools_that_were_late_are_called_again_and_their_turn_is_kept(chat: ChatFormat) -> None:
    delays = iter([0.0, 1.0])

    def script(request: GenerationRequest) -> str:
        return call(next(delays)) if turn_of(request) < 2 else ANSWER

    carry_over = CarryOver(most=1)
    engine = ScriptedEngine(chat, script)
    assert play(engine, carry_over, version=3).waiting == 1
    begun = len(engine.requests)
    late = Deadlines(step_s=8.0)
    (trajectory,) = play(engine, carry_over, version=4, deadlines=late).trajectories
    assert [request.id for request in engine.requests[begun:]] == ["task/3.0.0~1:2"]
    assert versions(trajectory) == [3, 3, 4]
    (answered,) = trajectory.turns[1].calls
    assert answered.executed and trajectory.turns[1].observation_span is not None
    assert trajectory.stop is StopReason.ANSWER
    assert len(trajectory.images) == 3


def test_a_group_waits_as_a_whole_and_what_is_over_is_not_played_again(chat: ChatFormat) -> None:
    carry_over = CarryOver(most=1)
    engine = SilentEngine(chat, lambda _: ANSWER)
    engine.silent = ("task/0.0.1:0",)
    waiting = play(engine, carry_over, version=0, rollouts=3)
    assert (waiting.trajectories, waiting.waiting) == ((), 1)
    begun = len(engine.requests)
    group = play(engine, carry_over, version=1, rollouts=3)
    assert [request.id for request in engine.requests[begun:]] == ["task/0.0.1~1:0"]
    assert [t.id for t in group.trajectories] == ["task/0.0.0", "task/0.0.1", "task/0.0.2"]
    assert [t.policy_version for t in group.trajectories] == [0, 1, 0]
    assert (group.waiting, group.surplus) == (0, 0)


@pytest.mark.parametrize("most", [1, 2])
def test_an_attempt_goes_on_so_often_and_is_then_cut(chat: ChatFormat, most: int) -> None:
    carry_over = CarryOver(most=most)
    engine = SilentEngine(chat, three_calls)
    engine.silent = tuple(f"task/0.0.0{anew}:1" for anew in ("", "~1", "~2"))
    short = Deadlines(step_s=0.1)
    for version in range(most):
        assert play(engine, carry_over, version=version, deadlines=short).waiting == 1
    (trajectory,) = play(engine, carry_over, version=most, deadlines=short).trajectories
    assert trajectory.stop is StopReason.DEADLINE
    assert versions(trajectory) == [0] and trajectory.policy_version == most


@pytest.mark.parametrize("own", [Deadlines(turn_s=0.1), Deadlines(trajectory_s=0.1)])
def test_the_deadlines_of_turn_and_trajectory_still_cut_for_good(
    chat: ChatFormat, own: Deadlines
) -> None:
    engine = SilentEngine(chat, three_calls)
    engine.silent = ("task/0.0.0:1",)
    group = play(engine, CarryOver(most=9), version=0, deadlines=replace(own, step_s=5.0))
    assert group.waiting == 0
    assert [t.stop for t in group.trajectories] == [StopReason.DEADLINE]


def test_the_time_of_a_trajectory_adds_up_over_steps_without_the_time_between(
    chat: ChatFormat,
) -> None:
    carry_over = CarryOver(most=9)
    engine = SilentEngine(chat, lambda _: ANSWER)
    engine.silent = ("task/0.0.0:0", "task/0.0.0~1:0")
    assert play(engine, carry_over, version=0, deadlines=Deadlines(step_s=0.3)).waiting
    time.sleep(1.0)
    started = time.perf_counter()
    second = Deadlines(step_s=5.0, trajectory_s=0.8)
    carry_over._groups["task"][0]._deadlines = second  # type: ignore[union-attr]
    group = play(engine, carry_over, version=1, deadlines=second)
    assert [t.stop for t in group.trajectories] == [StopReason.DEADLINE]
    assert 0.4 < time.perf_counter() - started < 0.75


def test_spare_attempts_wait_with_their_group_and_may_complete_it(chat: ChatFormat) -> None:
    """Of 4 attempts for 3 places, 2 are over; both others go on, and the first one wins."""
    carry_over = CarryOver(most=1)
    engine = SilentEngine(chat, lambda request: call(9.0) if hangs(request) else ANSWER)
    engine.silent = ("task/0.0.1:0", "task/0.0.3:0")

    def hangs(request: GenerationRequest) -> bool:
        return rollout_of(replace(request, id=request.id.replace("~1", ""))) == 1

    waiting = play(engine, carry_over, version=0, rollouts=3, oversample=4 / 3)
    assert (waiting.trajectories, waiting.waiting) == ((), 2)
    patient = Deadlines(step_s=5.0)
    started = time.perf_counter()
    group = play(engine, carry_over, version=1, rollouts=3, oversample=4 / 3, deadlines=patient)
    assert time.perf_counter() - started < 4, "the tool that hangs was waited for"
    assert [t.id[-1] for t in group.trajectories] == ["0", "2", "3"]
    assert (group.surplus, group.waiting) == (1, 0)


def test_an_interrupted_spare_of_a_complete_group_is_dropped(chat: ChatFormat) -> None:
    carry_over = CarryOver(most=1)
    engine = SilentEngine(chat, lambda _: ANSWER)
    engine.silent = ("task/0.0.0:0",)
    group = play(engine, carry_over, version=0, rollouts=2, oversample=1.5)
    assert [t.id[-1] for t in group.trajectories] == ["1", "2"] and group.waiting == 0
    assert carry_over.take("task") == []


class LatePlay:
    """Plays without an engine: a question waits as often as `late` says."""

    def __init__(self, late: dict[str, int]) -> None:
        self.late = late
        self.asked: list[list[str]] = []

    def __call__(
        self, tasks: Sequence[Task], *, rollouts: int, greedy: bool, policy_version: int
    ) -> list[Group]:
        self.asked.append([task.id for task in tasks])
        return [self.group(task, policy_version) for task in tasks]

    def group(self, task: Task, version: int) -> Group:
        if self.late.get(task.id, 0):
            self.late[task.id] -= 1
            return Group(task=task, trajectories=(), waiting=1)
        turns = (
            Turn(index=0, span=Span(start=1, end=4), text="", policy_version=version - 2),
            Turn(index=1, span=Span(start=4, end=5), text="", policy_version=version),
        )
        trajectory = Trajectory(
            id=task.id,
            task=task,
            tokens=np.zeros(5, dtype=np.int32),
            logprobs=np.zeros(4, dtype=np.float32),
            turns=turns,
            images=(),
            answer=None,
            stop=StopReason.ANSWER,
        )
        return Group(task=task, trajectories=(trajectory,))


def carried(play: LatePlay, *, num_tasks: int = 9, per_step: int = 3) -> CarriedOver:
    tasks = [Task(id=str(n), question="?", images=(), answers=("a",)) for n in range(num_tasks)]
    order = TaskSampler([task.id for task in tasks], seed=0, shuffle=False)
    return CarriedOver(
        Questions(
            tasks=tasks,
            order=order,
            play=play,
            interruption=Interruption(),
            per_step=per_step,
            rollouts=1,
        )
    )


def test_a_group_that_waits_keeps_its_position_and_new_questions_take_the_others() -> None:
    play = LatePlay({"1": 2, "3": 1})
    rounds = carried(play)
    found = [rounds(step) for step in range(4)]
    assert play.asked == [["0", "1", "2"], ["1", "3", "4"], ["1", "3", "5"], ["6", "7", "8"]]
    placed = [dict(zip(r.questions, [g.task.id for g in r.groups], strict=True)) for r in found]
    assert placed == [
        {0: "0", 2: "2"},
        {2: "4"},
        {0: "3", 1: "1", 2: "5"},
        {0: "6", 1: "7", 2: "8"},
    ]
    assert [r.metrics["rollout/groups_waiting"] for r in found] == [1, 2, 0, 0]


def test_a_question_that_waits_is_not_asked_anew() -> None:
    play = LatePlay({"0": 3})
    rounds = carried(play, num_tasks=4, per_step=3)
    for step in range(4):
        rounds(step)
    assert [sorted(asked) for asked in play.asked] == [
        ["0", "1", "2"],
        ["0", "1", "3"],
        ["0", "2", "3"],
        ["0", "1", "2"],
    ]


def test_a_step_in_which_nothing_is_complete_plays_on() -> None:
    play = LatePlay({"0": 2, "1": 2, "2": 3})
    rolled = carried(play)(0)
    assert play.asked == [["0", "1", "2"]] * 3
    assert [g.task.id for g in rolled.groups] == ["0", "1"]
    assert rolled.metrics["rollout/groups_waiting"] == 1


def test_staleness_is_the_age_of_the_weights_per_sampled_token() -> None:
    rolled = carried(LatePlay({}))(5)
    assert rolled.metrics["rollout/staleness"] == pytest.approx(2 * 3 / 4)
    assert rolled.metrics["rollout/staleness_max"] == 2


def test_a_resumed_run_asks_what_waited_first() -> None:
    stopped = carried(LatePlay({"1": 9}))
    stopped(0)
    state = json.loads(json.dumps(stopped.state_dict()))
    assert state == {"waiting": [[1, "1"]]}
    play = LatePlay({})
    resumed = carried(play)
    resumed._questions.order.load_state_dict(stopped._questions.order.state_dict())
    resumed.load_state_dict(state)
    rolled = resumed(1)
    assert [g.task.id for g in rolled.groups] == ["3", "1", "4"]
    assert rolled.questions == [0, 1, 2]


class Kept:
    """A checkpoint in memory, as JSON."""

    def __init__(self) -> None:
        self.text = "null"

    def load_latest(self) -> Any:
        return json.loads(self.text)


def test_a_checkpoint_holds_what_waits_and_the_order_it_was_drawn_from() -> None:
    kept = Kept()

    def trainer_of(rounds: CarriedOver) -> Trainer:
        order = rounds._questions.order
        parts = SimpleNamespace(order=order, rounds=rounds, stateful={}, checkpoints=kept)
        return Trainer(cast(Parts, parts), cast(Schedule, SimpleNamespace(save_every=1)))

    stopped, resumed = carried(LatePlay({"0": 9, "2": 9})), carried(LatePlay({}))
    stopped(0)
    kept.text = json.dumps(trainer_of(stopped)._state(0))
    assert trainer_of(resumed)._resume() == 1
    rolled = resumed(1)
    assert [g.task.id for g in rolled.groups] == ["0", "3", "2"]


def test_a_carried_group_is_compared_and_trained_as_one_with_the_samplers_own_numbers(
    chat: ChatFormat,
) -> None:
    carry_over = CarryOver(most=1)

    def script(request: GenerationRequest) -> str:
        if turn_of(request) == 0:
            return call(0)
        return f"<answer>{'no' if '.1~' in request.id else 'Velor'}</answer>"

    engine = SilentEngine(chat, script)
    engine.silent = ("task/0.0.1:1",)
    assert play(engine, carry_over, version=0, rollouts=2).waiting == 1
    group = play(engine, carry_over, version=1, rollouts=2)
    assert [versions(t) for t in group.trajectories] == [[0, 0], [0, 1]]
    run = outcome_trainer()
    batch = run._advantages([group], [0])
    np.testing.assert_allclose(batch.advantages.rows, [1.0, -1.0], atol=1e-6)
    credit = run._credit(batch)
    assert list(credit.step_advantages[1]) == pytest.approx([-0.2, -1.0]), "0.8 of the blame"
    ((micro_batch,),), _ = run._cut(0, batch, credit)
    own = {t.id: t.logprobs for t in group.trajectories}
    expected = np.concatenate([own[id] for id in micro_batch.row_ids])
    np.testing.assert_array_equal(micro_batch.sampler_logprobs.numpy(), expected)


@pytest.mark.parametrize("waiting", [[[3, "0"]], [[-1, "0"]], [[0, "1"], [0, "2"]]])
def test_questions_that_wait_at_impossible_positions_are_refused(
    waiting: list[tuple[int, str]],
) -> None:
    with pytest.raises(DataError, match="rounds state: found questions"):
        carried(LatePlay({})).load_state_dict({"waiting": waiting})


def test_a_waiting_question_whose_task_is_gone_leaves_its_place_to_another() -> None:
    play = LatePlay({})
    resumed = carried(play)
    resumed.load_state_dict({"waiting": [[2, "8"], [0, "gone"]]})
    assert [group.task.id for group in resumed(1).groups] == ["0", "1", "8"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], r"rollout\.deadlines\.step_s: found null, wanted a time"),
        (
            ["rollout.deadlines.step_s=9", "rollout.refill_rounds=1"],
            r"rollout\.refill_rounds: found 1, wanted 0",
        ),
        (
            ["rollout.deadlines.step_s=9", "algo/importance=none"],
            r"algo\.importance: found none, wanted a correction",
        ),
    ],
)
def test_what_carrying_over_needs_is_asked_for(overrides: list[str], said: str) -> None:
    recipe = ROOT / "recipes/demo_cpu.yaml"
    with pytest.raises(ConfigError, match=said):
        load_recipe(recipe, ["rollout.carry_over=1", *overrides])
    load_recipe(recipe, ["rollout.carry_over=1", "rollout.deadlines.step_s=9"])
