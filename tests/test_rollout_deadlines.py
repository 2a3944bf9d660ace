"""Late trajectories are cut at a border and kept; surplus attempts are dropped."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest
from rollout_world import SYSTEM_PROMPT, draw_toolbox, picture_task
from scripted_engine import ScriptedEngine, turn_of

from tapo_train.credit.assigners import NoTransfer
from tapo_train.credit.steps import from_trajectory
from tapo_train.errors import ConfigError
from tapo_train.report.dumps import TrajectoryDump
from tapo_train.report.trajectory_metrics import combine, trajectory_sums
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.collect import collect
from tapo_train.rollout.engine import Completion, GenerationRequest, Sampling
from tapo_train.rollout.limits import NEVER, Deadlines, Limits
from tapo_train.types import Group, StopReason, Trajectory

ANSWER = "<answer>x</answer>"


@pytest.fixture(scope="module")
def chat(tiny_qwen3_vl: Path) -> ChatFormat:
    return ChatFormat(tiny_qwen3_vl)


def call(delay_s: float) -> str:
    arguments = f'{{"note": "n", "delay_s": {delay_s}}}'
    return f'<tool_call>{{"name": "draw", "arguments": {arguments}}}</tool_call>'


class SilentEngine(ScriptedEngine):
    """Never finishes the requests whose id is in `silent`; looks again every millisecond."""

    silent: tuple[str, ...] = ()

    def idle_s(self) -> float:
        return 0.001

    def step(self) -> list[Completion]:
        held = {id: left for id, left in self._left.items() if id in self.silent}
        self._left = {id: left for id, left in self._left.items() if id not in self.silent}
        done = super().step()
        self._left |= held
        return done


def play(
    engine: ScriptedEngine,
    *,
    deadlines: Deadlines = NEVER,
    rollouts: int = 1,
    oversample: float = 1.0,
    max_in_flight: int = 256,
) -> Group:
    (group,) = collect(
        [picture_task()],
        engine=engine,
        chat=engine.chat,
        toolbox=draw_toolbox(),
        system_prompt=SYSTEM_PROMPT,
        rollouts_per_task=rollouts,
        limits=Limits(max_turns=6, max_turn_tokens=200, max_tokens=2000),
        sampling=Sampling(),
        deadlines=deadlines,
        oversample=oversample,
        max_in_flight=max_in_flight,
    )
    return group


def rollout_of(request: GenerationRequest) -> int:
    return int(request.id.rpartition(":")[0].rpartition(".")[2])


def numbers(group: Group) -> list[int]:
    """Which attempts a group holds."""
    return [int(trajectory.id.rpartition(".")[2]) for trajectory in group.trajectories]


def stuck_in_the_third_turn(chat: ChatFormat, deadlines: Deadlines) -> tuple[Trajectory, list[str]]:
    engine = SilentEngine(chat, lambda request: call(0) if turn_of(request) < 4 else ANSWER)
    engine.silent = ("task/0.0.0:2",)
    (trajectory,) = play(engine, deadlines=deadlines).trajectories
    assert not engine.has_unfinished()
    return trajectory, engine.aborted


@pytest.mark.parametrize(
    "deadlines",
    [Deadlines(turn_s=0.15), Deadlines(trajectory_s=0.3), Deadlines(step_s=0.3)],
    ids=["turn", "trajectory", "step"],
)
def test_a_trajectory_stuck_in_sampling_is_cut_after_its_last_observation(
    chat: ChatFormat, deadlines: Deadlines
) -> None:
    trajectory, aborted = stuck_in_the_third_turn(chat, deadlines)
    assert aborted == ["task/0.0.0:2"], "the request must not go on in the engine"
    assert trajectory.stop is StopReason.DEADLINE
    assert trajectory.failed_outside_policy
    assert len(trajectory.turns) == 2
    last = trajectory.turns[-1].observation_span
    assert last is not None and last.end == len(trajectory.tokens)
    assert len(trajectory.logprobs) == sum(len(turn.span) for turn in trajectory.turns)
    assert len(trajectory.images) == 3, "the question's and one of each observation"


def test_a_trajectory_whose_tool_is_late_keeps_the_turn_without_the_answer(
    chat: ChatFormat,
) -> None:
    engine = ScriptedEngine(chat, lambda request: call(0 if turn_of(request) == 0 else 3.0))
    started = time.perf_counter()
    (trajectory,) = play(engine, deadlines=Deadlines(trajectory_s=0.2)).trajectories
    assert time.perf_counter() - started < 2
    assert trajectory.stop is StopReason.DEADLINE
    assert [turn.index for turn in trajectory.turns] == [0, 1]
    late = trajectory.turns[1]
    assert late.observation_span is None and late.span.end == len(trajectory.tokens)
    (unanswered,) = late.calls
    assert unanswered.valid and not unanswered.executed and unanswered.observation is None
    assert len(trajectory.images) == 2, "the late picture has no placeholders"


def test_time_in_an_earlier_turn_does_not_count_for_the_next(chat: ChatFormat) -> None:
    script = lambda request: call(0.5) if turn_of(request) < 3 else ANSWER  # noqa: E731
    (trajectory,) = play(ScriptedEngine(chat, script), deadlines=Deadlines(turn_s=1.2)).trajectories
    assert (trajectory.stop, len(trajectory.turns)) == (StopReason.ANSWER, 4)


def test_those_that_never_began_in_a_step_are_marked_as_well(chat: ChatFormat) -> None:
    engine = ScriptedEngine(chat, lambda _: call(0.25))
    group = play(engine, deadlines=Deadlines(step_s=0.15), rollouts=3, max_in_flight=1)
    assert [t.stop for t in group.trajectories] == [StopReason.DEADLINE] * 3
    assert [len(t.turns) for t in group.trajectories] == [1, 0, 0]
    assert len(engine.requests) == 1, "nothing is asked of the engine after the deadline"


def test_later_stages_take_a_trajectory_without_turns(chat: ChatFormat, tmp_path: Path) -> None:
    engine = ScriptedEngine(chat, lambda _: call(0.25))
    group = play(engine, deadlines=Deadlines(step_s=0.05), rollouts=2, max_in_flight=1)
    scored = list(group.trajectories)
    metrics = combine([trajectory_sums([Group(task=group.task, trajectories=tuple(scored))])])
    assert metrics["rollout/stop/deadline"] == 1.0
    assert metrics["rollout/failed_outside_policy"] == 1.0
    credit = NoTransfer()([from_trajectory(t, 0.0) for t in scored])
    TrajectoryDump(tmp_path).write(0, scored, [0.0, 0.0], credit)
    dumped = (tmp_path / "tokens" / "step_000000.jsonl").read_text().splitlines()
    assert len(dumped) == 2 and all('"stop": "deadline"' in line for line in dumped)
    assert (tmp_path / "rollouts" / "step_000000.jsonl").read_text() == ""


def test_without_deadlines_nothing_is_late(chat: ChatFormat) -> None:
    engine = ScriptedEngine(chat, lambda request: call(0.01) if turn_of(request) < 2 else ANSWER)
    (patient,) = play(engine, deadlines=Deadlines(turn_s=60, trajectory_s=60)).trajectories
    (untimed,) = play(engine).trajectories
    np.testing.assert_array_equal(patient.tokens, untimed.tokens)
    assert patient.stop is untimed.stop is StopReason.ANSWER


def test_an_error_that_looks_like_a_timeout_is_not_taken_for_a_deadline(chat: ChatFormat) -> None:
    class TimingOut(ScriptedEngine):
        def submit(self, request: GenerationRequest) -> None:
            raise TimeoutError("the engine's own")

    with pytest.raises(TimeoutError, match="the engine's own"):
        play(TimingOut(chat, lambda _: ANSWER), deadlines=Deadlines(turn_s=60))


def test_deadlines_of_no_time_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"deadlines\.turn_s is 0; wanted > 0"):
        Deadlines(turn_s=0)


def test_a_whole_number_of_attempts_is_not_rounded_up(chat: ChatFormat) -> None:
    group = play(ScriptedEngine(chat, lambda request: ANSWER), rollouts=50, oversample=1.1)
    assert group.surplus == 5, "50 * 1.1 is a little more than 55 in floating point"


def test_oversampling_keeps_the_first_to_finish_and_aborts_the_rest(chat: ChatFormat) -> None:
    def script(request: GenerationRequest) -> str:
        is_slow = rollout_of(request) in (0, 3) and turn_of(request) == 0
        return call(20.0) if is_slow else ANSWER

    started = time.perf_counter()
    group = play(ScriptedEngine(chat, script), rollouts=4, oversample=1.5)
    assert time.perf_counter() - started < 10, "the slow tools were waited for"
    assert numbers(group) == [1, 2, 4, 5]
    assert group.surplus == 2


@pytest.mark.parametrize(
    ("rollouts", "oversample", "started"), [(3, 1.5, 5), (3, 1.1, 4), (10, 1.1, 11), (2, 1.0, 2)]
)
def test_attempts_are_started_so_often_rounded_up(
    chat: ChatFormat, rollouts: int, oversample: float, started: int
) -> None:
    engine = ScriptedEngine(chat, lambda _: ANSWER)
    group = play(engine, rollouts=rollouts, oversample=oversample)
    assert (len(group.trajectories), group.surplus) == (rollouts, started - rollouts)
    assert len(engine.requests) == started


def test_requests_of_surplus_attempts_do_not_stay_in_the_engine(chat: ChatFormat) -> None:
    engine = SilentEngine(chat, lambda _: ANSWER)
    engine.silent = ("task/0.0.1:0",)
    assert numbers(play(engine, rollouts=3, oversample=4 / 3)) == [0, 2, 3]
    assert engine.aborted == ["task/0.0.1:0"]
    assert not engine.has_unfinished()


def test_a_spare_attempt_takes_the_place_of_a_late_one(chat: ChatFormat) -> None:
    engine = SilentEngine(chat, lambda request: call(0.6) if turn_of(request) < 2 else ANSWER)
    engine.silent = ("task/0.0.0:0",)
    group = play(engine, rollouts=2, oversample=1.5, deadlines=Deadlines(turn_s=1.0))
    assert numbers(group) == [1, 2]
    assert [t.stop for t in group.trajectories] == [StopReason.ANSWER] * 2
    assert [(t.id, t.stop) for t in group.lost] == [("task/0.0.0", StopReason.DEADLINE)]


def test_failed_attempts_fill_a_group_only_when_nothing_better_is_left(chat: ChatFormat) -> None:
    engine = SilentEngine(chat, lambda _: ANSWER)
    engine.silent = ("task/0.0.0:0", "task/0.0.2:0")
    group = play(engine, rollouts=2, oversample=1.5, deadlines=Deadlines(turn_s=0.1))
    assert numbers(group) == [0, 1]
    assert [t.stop for t in group.trajectories] == [StopReason.DEADLINE, StopReason.ANSWER]
    assert [t.id for t in group.lost] == ["task/0.0.2"], "the one that fills a place is kept"


def test_a_cancelled_rollout_leaves_the_engine_empty(chat: ChatFormat) -> None:
    """What Ctrl-C does: the event loop cancels everything."""
    engine = SilentEngine(chat, lambda _: ANSWER)
    engine.silent = ("task/0.0.0:0", "task/0.0.1:0")

    class Interrupting(SilentEngine):
        def idle_s(self) -> float:
            raise KeyboardInterrupt

    engine.__class__ = Interrupting
    with pytest.raises((KeyboardInterrupt, asyncio.CancelledError)):
        play(engine, rollouts=2)
    assert not engine.has_unfinished()
