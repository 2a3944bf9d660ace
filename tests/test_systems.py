"""The formulas of tapo_train/systems against numbers worked out by hand."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rewarding import scoring
from rollout_world import SYSTEM_PROMPT, draw_toolbox, picture_task, written_trajectory
from scripted_engine import ScriptedEngine

from tapo_train.algos.turn_advantages import RewardRow
from tapo_train.errors import TapoError
from tapo_train.learner.batch import TrainingRow
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.collect import collect
from tapo_train.rollout.engine import GenerationRequest, Sampling
from tapo_train.rollout.limits import Limits
from tapo_train.systems.igpo import InformationGain, accumulated
from tapo_train.systems.vsrm import StepGains, cut_into_steps, gains
from tapo_train.training.process import PolicyAccess, Processes, earning
from tapo_train.types import Group, Trajectory, VersionSpan


@pytest.fixture(scope="module")
def chat(tiny_qwen3_vl: Path) -> ChatFormat:
    return ChatFormat(tiny_qwen3_vl)


def scored(trajectory: Trajectory) -> Trajectory:
    return asyncio.run(scoring()(trajectory))


def access(chat: ChatFormat, script: Callable[[GenerationRequest], str]) -> PolicyAccess:
    """A policy that writes what the script says; it has no learner."""
    nobody: Any = None
    return PolicyAccess(
        chat=chat,
        policy=nobody,
        engine=ScriptedEngine(chat, script),
        score=scoring(),
        sampling=Sampling(),
        budget_tokens=1024,
    )


def said(chat: ChatFormat, text: str) -> Trajectory:
    """One turn that says this, with its reward."""
    (group,) = collect(
        [picture_task()],
        engine=ScriptedEngine(chat, lambda request: text),
        chat=chat,
        toolbox=draw_toolbox(),
        system_prompt=SYSTEM_PROMPT,
        rollouts_per_task=1,
        limits=Limits(max_turns=4, max_turn_tokens=200, max_tokens=1000),
        sampling=Sampling(),
        score=scoring(),
    )
    return group.trajectories[0]


# VSRM


def test_a_step_earns_its_change_of_correctness_and_looks_ahead_where_nothing_changes() -> None:
    correct = [0.0, 0.0, 0.75, 0.75, 0.5]
    assert gains(correct) == [0.0, 0.0, 0.75, 0.0, -0.25]
    assert gains(correct, decay=0.5, window=1) == [0.0, 0.375, 0.75, -0.125, -0.25]
    assert gains(correct, decay=0.5, window=2) == [0.1875, 0.375, 0.75, -0.125, -0.25]
    assert sum(gains(correct)) == correct[-1]


def test_an_answer_is_tried_after_each_step_of_a_thought(chat: ChatFormat) -> None:
    text = "<think>It is Bo. So Velor. Wait, still Velor.</think><answer>Velor</answer>"
    attempt = said(chat, text)
    asked: list[str] = []

    def guess(request: GenerationRequest) -> str:
        asked.append(chat.decode(request.tokens).text.rpartition("assistant\n")[2])
        return "Velor</answer>" if "So" in asked[-1] else "Bo</answer>"

    (found,) = StepGains(weight=2.0)([attempt], access(chat, guess))
    steps = [turn.text for turn in found.turns]
    assert steps == ["<think>It is Bo. ", "So Velor. ", "Wait, still Velor.</think>" + text[-22:]]
    assert asked == [steps[0] + "</think><answer>", steps[0] + steps[1] + "</think><answer>"]
    assert found.scored().turns == (0.0, 2.0, 0.0)
    assert found.scored().total == attempt.scored().total + 2.0
    assert found.scored().parts["step_gain"] == 2.0
    np.testing.assert_array_equal(found.tokens, attempt.tokens)
    assert sum(len(turn.span) for turn in found.turns) == len(attempt.logprobs)


def test_steps_keep_a_turns_call_versions_and_reward_in_their_last(chat: ChatFormat) -> None:
    whole = scored(written_trajectory(chat))
    turn = whole.turns[0]
    length = len(turn.span)
    versions = (
        VersionSpan(start=0, end=5, version=1),
        VersionSpan(start=5, end=length, version=2),
    )
    rewards = replace(whole.scored(), turns=(0.25, 0.5, 0.0))
    aged = replace(
        whole, turns=(replace(turn, versions=versions), *whole.turns[1:]), reward=rewards
    )
    found = cut_into_steps(aged, [[turn.span.start + 3, turn.span.start + 7], [], []], chat)
    assert [t.index for t in found.turns] == [0, 1, 2, 3, 4]
    assert [len(t.calls) for t in found.turns] == [0, 0, 1, 1, 0]
    assert [t.observation_span is None for t in found.turns] == [True, True, False, False, True]
    assert found.scored().turns == (0.0, 0.0, 0.25, 0.5, 0.0)
    np.testing.assert_array_equal(found.token_versions(), aged.token_versions())
    assert "".join(t.text for t in found.turns[:3]) == turn.text


# IGPO


@dataclass
class KnownLogprobs:
    """Says of each row what it was told, for all of its tokens."""

    chat: ChatFormat
    values: Sequence[float]
    rows: list[TrainingRow] = field(default_factory=list)

    def logprobs(self, rows: Sequence[TrainingRow]) -> list[Any]:
        self.rows = list(rows)
        return [
            np.full(row.num_trained, value) for row, value in zip(rows, self.values, strict=True)
        ]


def test_a_turn_earns_the_rise_of_the_accepted_answers_log_probability(chat: ChatFormat) -> None:
    attempt = scored(written_trajectory(chat))
    known: Any = KnownLogprobs(chat, [-3.0, -1.0, -1.5])
    (found,) = InformationGain(weight=0.5)([attempt], known)
    assert found.scored().turns == (1.0, -0.25, 0.0)
    assert found.scored().total == attempt.scored().total + 0.75
    (as_probability,) = InformationGain(of="probability")([attempt], known)
    wanted = (math.exp(-1) - math.exp(-3), math.exp(-1.5) - math.exp(-1), 0.0)
    assert as_probability.scored().turns == pytest.approx(wanted)
    assert [len(row.images) for row in known.rows] == [1, 2, 3]
    for row, turn in zip(known.rows, attempt.turns, strict=True):
        (gold,) = row.spans
        assert chat.decode(row.tokens[gold.start : gold.end]).text == "Velor"
        np.testing.assert_array_equal(
            row.tokens[: turn.span.start], attempt.tokens[: turn.span.start]
        )
        rest = chat.decode(row.tokens[turn.span.start :]).text
        assert rest == "<answer>Velor</answer><|im_end|>"


def test_turn_rewards_are_normalised_over_the_group_and_then_summed() -> None:
    def row(total: float, *turns: float, left_out: bool = False) -> RewardRow:
        tokens = (1,) * len(turns)
        return RewardRow(
            group="q", total=total, tokens=tokens, turn_rewards=turns, left_out=left_out
        )

    # Rewards by turn are 1, 3 (2 of them the outcome's) and 0, 0: mean 1, deviation sqrt(2).
    rows = [row(4.0, 1.0, 1.0), row(0.0, 0.0, 0.0), row(9.0, 9.0, left_out=True)]
    first, second, out = accumulated(rows, gamma=0.5)
    unit = 1 / (math.sqrt(2) + 1e-6)
    np.testing.assert_allclose(first, [0 + 0.5 * 2 * unit, 2 * unit])
    np.testing.assert_allclose(second, [-1.5 * unit, -unit])
    assert out.tolist() == [0.0]


# The seam


def test_a_stage_that_leaves_trajectories_out_is_counted_by_its_word(chat: ChatFormat) -> None:
    attempt = scored(written_trajectory(chat))
    other = replace(attempt, id="other")

    def drops_the_first(given: Sequence[Trajectory], policy: PolicyAccess) -> list[Trajectory]:
        return [replace(given[0], unscored="too_long"), earning(given[1], (1, 0, 2), part="extra")]

    stages = Processes(stages=[drops_the_first], access=access(chat, lambda request: ""))
    group = Group(task=attempt.task, trajectories=(attempt, other))
    ((changed,), metrics) = stages([group])
    assert [t.failed_outside_policy for t in changed.trajectories] == [True, False]
    assert metrics == {
        "process/left_out": 0.5,
        "process/left_out/too_long": 0.5,
        "process/earned": 1.5,
        "process/steps": 1.5,
    }


def test_a_stage_that_loses_a_trajectory_ends_the_run(chat: ChatFormat) -> None:
    attempt = scored(written_trajectory(chat))
    stages = Processes(
        stages=[lambda given, policy: given[1:]], access=access(chat, lambda request: "")
    )
    with pytest.raises(TapoError, match=r"reward\.process: a stage gave other trajectories"):
        stages([Group(task=attempt.task, trajectories=(attempt,))])
    with pytest.raises(TapoError, match="2 rewards for 3 turns"):
        earning(attempt, (1.0, 2.0), part="extra")
