"""Groups that stay under way from one update to the next: whose tokens, how old, none lost."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from fake_vllm import wait_until
from process_environment import ROOT
from scripted_engine import ScriptedEngine, turn_of
from streaming import ids, numbered, streamed, trained
from test_outcomes import trainer as outcome_trainer
from test_rollout_deadlines import ANSWER, SilentEngine, call

from tapo_train.credit.diagnostics import finish
from tapo_train.errors import ConfigError, DataError, EngineError
from tapo_train.recipe.compose import load_recipe
from tapo_train.recipe.staleness import cautions
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.engine import Completion, GenerationRequest
from tapo_train.rollout.limits import Deadlines
from tapo_train.training.ages import credit_by_age
from tapo_train.training.interruption import Interruption, StepGivenUp
from tapo_train.training.parts import Parts, Rolled, Schedule
from tapo_train.training.stream import Stream
from tapo_train.training.trainer import Trainer
from tapo_train.types import StopReason, VersionSpan

BOTH = pytest.mark.parametrize("apart", [False, True], ids=["same device", "its own"])


@pytest.fixture(scope="module")
def chat(tiny_qwen3_vl: Path) -> ChatFormat:
    return ChatFormat(tiny_qwen3_vl)


def question_of(request: GenerationRequest) -> int:
    return int(request.id.partition("/")[0])


def slow(questions: set[int], delay_s: float) -> Callable[[GenerationRequest], str]:
    """One call, which takes long for some questions; then an answer."""

    def script(request: GenerationRequest) -> str:
        if turn_of(request) > 0:
            return ANSWER
        return call(delay_s if question_of(request) in questions else 0.0)

    return script


def versions(rolled: Rolled) -> list[list[int]]:
    """Of the turns of each trajectory."""
    return [[u.policy_version for u in t.turns] for g in rolled.groups for t in g.trajectories]


@BOTH
def test_without_staleness_an_update_trains_what_was_asked_for_it_and_nothing_goes_on(
    chat: ChatFormat, apart: bool
) -> None:
    engine = ScriptedEngine(chat, slow({0, 3}, 0.05))
    rolled = trained(streamed(engine, staleness=0, apart=apart), 3)
    assert [ids(r) for r in rolled] == [["0", "1"], ["2", "3"], ["4", "5"]]
    for step, one in enumerate(rolled):
        assert one.questions == [0, 1]
        assert one.metrics == {
            "rollout/groups_under_way": 0.0,
            "rollout/staleness": 0.0,
            "rollout/staleness_max": 0.0,
            "rollout/versions": 1.0,
        }
        assert {t.id for g in one.groups for t in g.trajectories} == {
            f"{id}/{step}.0.0" for id in ids(one)
        }


def test_a_slow_question_is_passed_by_and_goes_on_with_the_next_weights(chat: ChatFormat) -> None:
    engine = ScriptedEngine(chat, slow({0}, 0.5))
    first, second = trained(streamed(engine, staleness=1, steps=2), 2)
    assert ids(first) == ["1", "2"] and ids(second) == ["0", "3"]
    assert versions(first) == [[0, 0], [0, 0]]
    assert versions(second)[0] == [0, 1], "its call was made before the update"
    assert first.metrics["rollout/groups_under_way"] >= 1
    trajectory = second.groups[0].trajectories[0]
    assert trajectory.policy_version == 1
    written = [len(turn.span) for turn in trajectory.turns]
    np.testing.assert_array_equal(trajectory.token_versions(), np.repeat([0, 1], written))
    ages = np.concatenate([np.full(written[0], 1), np.zeros(written[1])])
    others = second.groups[1].trajectories[0]
    ages = np.concatenate([ages, 1 - others.token_versions()])
    assert second.metrics["rollout/staleness"] == pytest.approx(ages.mean())
    assert second.metrics["rollout/staleness_max"] == 1
    assert [r.id for r in engine.requests].count("0/0.0.0:0") == 1, "nothing is sampled twice"


def test_on_the_same_device_no_turn_is_cut_off_and_none_is_sampled_during_the_update(
    chat: ChatFormat,
) -> None:
    """Question 1 writes for 30 steps of the engine; its turn is finished before the update."""

    class Uneven(ScriptedEngine):
        def submit(self, request: GenerationRequest) -> None:
            self.steps = 30 if question_of(request) == 1 and turn_of(request) == 0 else 1
            super().submit(request)

    def script(request: GenerationRequest) -> str:
        return call(0.0) if question_of(request) == 1 and turn_of(request) == 0 else ANSWER

    engine = Uneven(chat, script)
    during: list[tuple[int, bool]] = []

    def update(step: int) -> None:
        before = engine.num_steps
        time.sleep(0.1)
        during.append((engine.num_steps - before, engine.has_unfinished()))

    stream = streamed(engine, staleness=1, per_step=1, steps=2)
    first, second = trained(stream, 2, between=update)
    assert (ids(first), ids(second)) == (["0"], ["1"])
    assert engine.aborted == [] and during == [(0, False)] * 2
    assert versions(second) == [[0, 1]]


def test_on_devices_of_its_own_the_rollout_goes_on_during_the_update(chat: ChatFormat) -> None:
    engine = ScriptedEngine(chat, slow(set(), 0.02))
    seen: list[int] = []

    def begun() -> int:
        return len({question_of(request) for request in engine.requests})

    def update(step: int) -> None:
        wait_until(lambda: begun() >= 4 + 2 * step)
        time.sleep(0.1)
        seen.append(begun())

    trained(streamed(engine, staleness=1, apart=True), 3, between=update)
    assert seen == [4, 6, 8], "what may begin has begun, and no more"


@BOTH
def test_slow_questions_are_trained_within_their_time_and_lengths_as_they_were_sampled(
    chat: ChatFormat, apart: bool
) -> None:
    """Tools of every fourth question take ten times as long, and its trajectories are longer."""
    staleness, per_step, steps = 2, 4, 10
    draw = random.Random(0)
    turns = {n: 4 if n % 4 == 0 else draw.choice([1, 2]) for n in range(200)}

    def script(request: GenerationRequest) -> str:
        number = question_of(request)
        if turn_of(request) >= turns[number]:
            return ANSWER
        return call(0.1 if number % 4 == 0 else 0.01)

    engine = ScriptedEngine(chat, script)
    stream = streamed(
        engine,
        staleness=staleness,
        per_step=per_step,
        num_tasks=200,
        steps=steps,
        active=per_step * 2,
        apart=apart,
    )
    rolled = trained(stream, steps)
    lengths: list[int] = []
    for step, one in enumerate(rolled):
        assert len(one.groups) == per_step
        for group in one.groups:
            (trajectory,) = group.trajectories
            began = int(trajectory.id.partition("/")[2].partition(".")[0])
            assert 0 <= step - began <= staleness
            assert step - int(trajectory.token_versions().min()) <= staleness
            lengths.append(len(trajectory.turns) - 1)
    assert max(one.metrics["rollout/staleness_max"] for one in rolled) == staleness, "a weak test"
    # The run ends when all it began is trained: what was sampled is what was trained.
    assert Counter(lengths) == Counter(turns[n] for n in range(per_step * steps))


@BOTH
def test_tokens_carry_the_versions_that_the_engine_names(chat: ChatFormat, apart: bool) -> None:
    spans = (VersionSpan(start=0, end=2, version=3), VersionSpan(start=2, end=9, version=4))

    class Changing(ScriptedEngine):
        def step(self) -> list[Completion]:
            return [
                replace(c, versions=(spans[0], replace(spans[1], end=len(c.tokens))))
                for c in super().step()
            ]

    stream = streamed(Changing(chat, lambda _: ANSWER), staleness=0, per_step=1, apart=apart)
    stream._steps = 6
    (rolled,) = [trained(stream, 1)[0]]
    (trajectory,) = rolled.groups[0].trajectories
    (turn,) = trajectory.turns
    assert (turn.policy_version, trajectory.policy_version) == (3, 4)
    assert [(s.start, s.version) for s in turn.versions] == [(0, 3), (2, 4)]
    assert rolled.metrics["rollout/versions"] == 2


def test_what_is_under_way_is_asked_anew_by_a_resumed_run_none_lost_none_twice(
    chat: ChatFormat,
) -> None:
    stopped = streamed(ScriptedEngine(chat, slow({1, 4}, 0.4)), staleness=2)
    seen = [id for one in trained(stopped, 2) for id in ids(one)]
    state = json.loads(json.dumps(stopped.state_dict()))
    assert len(state["untrained"]) == 4 and not {*state["untrained"]} & {*seen}
    order = stopped._order.state_dict()
    engine = ScriptedEngine(chat, slow(set(), 0.0))
    resumed = streamed(engine, staleness=2)
    resumed._order.load_state_dict(order)
    resumed.load_state_dict(state)
    for step in range(2, 8):
        seen += ids(resumed(step))
    resumed.close()
    assert len(set(seen)) == len(seen) == 16
    assert sorted(map(int, seen)) == list(range(16))
    asked_anew = [r.id for r in engine.requests if r.id.partition("/")[0] in state["untrained"]]
    assert {id.partition("/")[2][0] for id in asked_anew} == {"2"}, "with the weights of then"


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_a_resumed_run_may_have_another_bound(chat: ChatFormat, staleness: int) -> None:
    stopped = streamed(ScriptedEngine(chat, lambda _: ANSWER), staleness=2)
    seen = [id for one in trained(stopped, 1) for id in ids(one)]
    resumed = streamed(ScriptedEngine(chat, lambda _: ANSWER), staleness=staleness)
    resumed._order.load_state_dict(stopped._order.state_dict())
    resumed.load_state_dict(stopped.state_dict())
    for step in range(1, 7):
        seen += ids(resumed(step))
    resumed.close()
    assert sorted(map(int, seen)) == list(range(14))


def test_questions_whose_tasks_are_gone_are_not_asked_and_none_is_taken_twice(
    chat: ChatFormat,
) -> None:
    resumed = streamed(ScriptedEngine(chat, lambda _: ANSWER), staleness=1)
    resumed.load_state_dict({"untrained": ["gone", "9"]})
    assert ids(trained(resumed, 1)[0]) == ["9", "0"]
    with pytest.raises(DataError, match="a question waits twice"):
        resumed.load_state_dict({"untrained": ["1", "1"]})


def test_no_question_is_under_way_twice_though_the_data_begins_again(chat: ChatFormat) -> None:
    stream = streamed(
        ScriptedEngine(chat, slow({0, 3}, 0.05)), staleness=2, per_step=2, num_tasks=6
    )
    for one in trained(stream, 9):
        assert len(set(ids(one))) == 2


def test_the_last_updates_begin_nothing_that_none_would_train(chat: ChatFormat) -> None:
    engine = ScriptedEngine(chat, lambda _: ANSWER)
    trained(streamed(engine, staleness=3, steps=4), 4)
    assert len(engine.requests) == 8


def test_a_checkpoint_holds_what_is_untrained_and_the_order_it_was_drawn_from(
    chat: ChatFormat,
) -> None:
    kept: list[str] = ["null"]

    def trainer_of(stream: Stream) -> Trainer:
        checkpoints = SimpleNamespace(load_latest=lambda: json.loads(kept[0]))
        parts = SimpleNamespace(
            order=stream._order, rounds=stream, stateful={}, checkpoints=checkpoints
        )
        return Trainer(cast(Parts, parts), cast(Schedule, SimpleNamespace(save_every=1)))

    stopped = streamed(ScriptedEngine(chat, slow({0}, 5.0)), staleness=1)
    assert ids(trained(stopped, 1)[0]) == ["1", "2"]
    kept[0] = json.dumps(trainer_of(stopped)._state(0))
    resumed = streamed(ScriptedEngine(chat, lambda _: ANSWER), staleness=1)
    assert trainer_of(resumed)._resume() == 1
    assert ids(trained_from(resumed, 1)) == ["0", "3"]


def trained_from(stream: Stream, step: int) -> Rolled:
    try:
        return stream(step)
    finally:
        stream.close()


def test_a_group_of_several_versions_is_compared_and_trained_as_one(chat: ChatFormat) -> None:
    """Advantages, credit and the sampler's own numbers, whatever the versions of its attempts."""

    def is_late(request: GenerationRequest) -> bool:
        return question_of(request) == 0 and ".1:" in request.id

    class Uneven(SilentEngine):
        """The late turn ends when the driver waits for nothing but the turns under way."""

        silent = ("0/0.0.1:0",)
        is_seen = False

        def step(self) -> list[Completion]:
            if self.is_seen:  # the driver has looked since: it begins no turn any more
                self.silent = ()
            self.is_seen = stream._is_ready()
            return super().step()

    def script(request: GenerationRequest) -> str:
        if turn_of(request) == 0:
            return call(0.0)
        return f"<answer>{'no' if is_late(request) else 'x'}</answer>"

    stream = streamed(Uneven(chat, script), staleness=1, steps=2, rollouts=2)
    second = trained(stream, 2)[1]
    group = second.groups[0]
    assert [[u.policy_version for u in t.turns] for t in group.trajectories] == [[0, 0], [0, 1]]
    run = outcome_trainer()
    batch = run._advantages([group], [0])
    np.testing.assert_allclose(batch.advantages.rows, [1.0, -1.0], atol=1e-6)
    credit = run._credit(batch)
    assert list(credit.step_advantages[1]) == pytest.approx([-0.2, -1.0]), "0.8 of the blame"
    by_age = credit_by_age(batch, credit, 1)
    assert by_age == {
        "by_age/1/total": 3,
        "by_age/1/corrected": 1,
        "by_age/0/total": 1,
        "by_age/0/corrected": 0,
    }
    assert finish(by_age)["credit/by_age/1/corrected"] == 1
    assert finish({"by_age/0/total": 4.0}) == {}
    ((micro_batch,),), _ = run._cut(1, batch, credit)
    own = {t.id: t.logprobs for t in group.trajectories}
    expected = np.concatenate([own[id] for id in micro_batch.row_ids])
    np.testing.assert_array_equal(micro_batch.sampler_logprobs.numpy(), expected)
    assert set(micro_batch.age.tolist()) == {0, 1}


def test_the_time_of_an_update_makes_nobody_late(chat: ChatFormat) -> None:
    engine = ScriptedEngine(chat, slow({0}, 0.3))
    late = Deadlines(turn_s=0.6, trajectory_s=1.0, step_s=1.0)
    stream = streamed(engine, staleness=1, steps=2, deadlines=late)
    second = trained(stream, 2, between=lambda step: time.sleep(1.2))[1]
    assert [t.stop for g in second.groups for t in g.trajectories] == [StopReason.ANSWER] * 2
    assert versions(second)[0] == [0, 1]


@BOTH
def test_a_group_that_takes_too_long_is_cut_and_trained(chat: ChatFormat, apart: bool) -> None:
    engine = ScriptedEngine(chat, slow({0}, 4.0))
    stream = streamed(engine, staleness=1, apart=apart, deadlines=Deadlines(step_s=1.5))
    rolled = trained(stream, 2)
    stops = {g.task.id: g.trajectories[0].stop for one in rolled for g in one.groups}
    assert stops["0"] is StopReason.DEADLINE
    assert {stops[id] for id in "123"} == {StopReason.ANSWER}


def test_places_are_given_in_order_and_not_more_than_there_are(chat: ChatFormat) -> None:
    engine = ScriptedEngine(chat, lambda _: ANSWER, steps=3)
    rolled = trained(streamed(engine, staleness=1, rollouts=3, max_in_flight=2), 2)
    assert engine.most_in_flight <= 2
    assert [ids(one) for one in rolled] == [["0", "1"], ["2", "3"]]


@BOTH
def test_what_goes_wrong_in_an_episode_or_the_engine_ends_the_wait(
    chat: ChatFormat, apart: bool
) -> None:
    class Broken(ScriptedEngine):
        def step(self) -> list[Completion]:
            if self.num_steps > 3:
                raise EngineError("out of memory")
            return super().step()

    with pytest.raises(EngineError, match="out of memory"):
        trained(streamed(Broken(chat, slow({0}, 0.1)), staleness=1, apart=apart), 9)
    long = replace(numbered(1)[0], question="?" * 9000)
    tasks = [*numbered(5)[1:], long]
    stream = streamed(ScriptedEngine(chat, lambda _: ANSWER), staleness=1, apart=apart, tasks=tasks)
    with pytest.raises(DataError, match="task 0: its prompt has"):
        trained(stream, 4)


@BOTH
def test_a_stream_that_is_closed_leaves_nothing_running(chat: ChatFormat, apart: bool) -> None:
    engine = SilentEngine(chat, slow({2}, 4.0))
    engine.silent = ("3/0.0.0:0",)
    stream = streamed(engine, staleness=1, apart=apart, active=4)
    engine.idle_s = lambda: 0.0  # type: ignore[method-assign]
    if apart:
        stream(0)
    stream.close()
    stream.close()
    assert not engine.has_unfinished()
    assert not [t for t in threading.enumerate() if t.name in ("engine", "episodes")]


@BOTH
def test_a_rollout_is_given_up_at_once_when_the_run_is_to_stop(
    chat: ChatFormat, apart: bool
) -> None:
    interruption = Interruption()

    class Asked(ScriptedEngine):
        def step(self) -> list[Completion]:
            interruption.is_requested = True
            return super().step()

    engine = Asked(chat, slow(set(), 0.0))
    stream = streamed(engine, staleness=0, apart=apart, interruption=interruption)
    stream(0)
    with pytest.raises(StepGivenUp):
        stream(1)
    assert {question_of(request) for request in engine.requests} == {0, 1}
    assert stream.state_dict() == {"untrained": ["2", "3"]}


SMALL_PATH = ROOT / "recipes" / "demo_cpu.yaml"


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["rollout.max_staleness=1", "rollout.refill_rounds=1"], "rollout.refill_rounds: found 1"),
        (["rollout.max_staleness=1", "algo/importance=none"], "algo.importance: found none"),
        (
            ["rollout.max_staleness=1", "rollout.engine.tensor_parallel=2"],
            "rollout.max_staleness: found 1, wanted 0",
        ),
        (
            ["rollout.active_questions=9", "data.questions_per_step=8"],
            "rollout.active_questions: found 9, wanted 8 to 8",
        ),
        (
            ["rollout.max_staleness=1", "rollout.active_questions=7", "data.questions_per_step=8"],
            "rollout.active_questions: found 7, wanted 8 to 16",
        ),
    ],
)
def test_a_recipe_that_cannot_stream_is_refused(overrides: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_recipe(SMALL_PATH, overrides)


def test_several_updates_on_top_of_staleness_are_said_and_nothing_else_is() -> None:
    stale = ["rollout.max_staleness=1"]
    assert cautions(load_recipe(SMALL_PATH, stale)) == []
    several = load_recipe(SMALL_PATH, [*stale, "learner.updates_per_batch=2"])
    assert "tokens up to 3 updates old" in cautions(several)[0]
    assert cautions(load_recipe(SMALL_PATH, ["learner.updates_per_batch=2"])) == []


def test_an_engine_server_may_be_stale() -> None:
    recipe = load_recipe(
        SMALL_PATH,
        ["rollout/engine=server", "rollout.engine.urls=[http://a:1]", "rollout.max_staleness=2"],
    )
    assert recipe.rollout.max_staleness == 2
