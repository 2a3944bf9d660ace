"""Every outcome of a tool call, from the tool to reward, baseline, credit and the loss's tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from pydantic import BaseModel
from rewarding import reward_of, scoring
from rollout_world import SYSTEM_PROMPT
from scripted_engine import ScriptedEngine, turn_of

from tapo_train.algos.advantages import group_advantages
from tapo_train.algos.turn_advantages import Advantages
from tapo_train.credit import Tapo, TapoOptions
from tapo_train.errors import (
    ToolArgumentError,
    ToolDownError,
    ToolError,
    ToolRefusedError,
)
from tapo_train.learner.balance import Kept
from tapo_train.report.trajectory_metrics import combine, trajectory_sums
from tapo_train.rollout.agent import Limits
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.collect import collect
from tapo_train.rollout.engine import GenerationRequest, Sampling
from tapo_train.tools.base import ToolContext
from tapo_train.tools.toolbox import Toolbox
from tapo_train.training.parts import Parts, Schedule
from tapo_train.training.trainer import Trainer
from tapo_train.types import Group, Observation, Outcome, StopReason, Task, Trajectory

RIGHT, WRONG = "<answer>Velor</answer>", "<answer>Miko</answer>"
CALL = '<tool_call>{"name": "search", "arguments": {"query": "tower"}}</tool_call>'
LIMITS = Limits(max_turns=4, max_turn_tokens=200, max_tokens=2000)

ERRORS: dict[Outcome, Exception | None] = {
    Outcome.OK: None,
    Outcome.MODEL_ERROR: ToolArgumentError("no such picture"),
    Outcome.TOOL_ERROR: ToolError("cannot do this"),
    Outcome.REFUSED: ToolRefusedError("not this host"),
    Outcome.TIMEOUT: TimeoutError("too late"),
    Outcome.INFRA_ERROR: ToolDownError("502 Bad Gateway"),
}
READ_BY_THE_POLICY = {Outcome.OK, Outcome.MODEL_ERROR, Outcome.TOOL_ERROR, Outcome.REFUSED}
POPULATION = {4: (1.7320508, -0.5773503), 3: (1.4142136, -0.7071068)}
"""Advantages of the success and of a failure, one success in a group of so many."""
BETA = 0.8
"""TAPO's default strength."""


class Query(BaseModel):
    """Arguments of the search."""

    query: str


class FlakySearch:
    """Answers the first call and fails the second."""

    name = "search"
    version = "1"
    description = "Search."
    arguments_model: type[BaseModel] = Query

    def __init__(self, error: Exception | None) -> None:
        self._error, self._calls = error, 0

    async def run(self, arguments: BaseModel, context: ToolContext) -> Observation:
        self._calls += 1
        if self._calls == 2 and self._error is not None:
            raise self._error
        return Observation(text="the tower stands in Velor")


@pytest.fixture(scope="module")
def chat(tiny_qwen3_vl: Path) -> ChatFormat:
    return ChatFormat(tiny_qwen3_vl)


@pytest.fixture(params=list(ERRORS), ids=str)
def outcome(request: pytest.FixtureRequest) -> Outcome:
    return cast(Outcome, request.param)


def script(request: GenerationRequest) -> str:
    """Rollout 0 searches and is right; 1 asks for the same and is wrong; 2 and 3 guess wrong."""
    rollout = int(request.id.rpartition(":")[0].rpartition(".")[2])
    if rollout <= 1 and turn_of(request) == 0:
        return CALL
    return RIGHT if rollout == 0 else WRONG


def play(chat: ChatFormat, outcome: Outcome) -> Group:
    (group,) = collect(
        [Task(id="q", question="Where is the tower?", images=(), answers=("Velor",))],
        engine=ScriptedEngine(chat, script),
        chat=chat,
        toolbox=Toolbox([FlakySearch(ERRORS[outcome])], deadline_s=5.0),
        system_prompt=SYSTEM_PROMPT,
        rollouts_per_task=4,
        limits=LIMITS,
        sampling=Sampling(),
        max_in_flight=1,  # equal calls at the same time would be one
        score=scoring(form=0.0),
    )
    return group


def trainer() -> Trainer:
    """A trainer with the parts between rollout and update."""

    def advantage(rows: Any) -> Advantages:
        totals, groups = [row.total for row in rows], [row.group for row in rows]
        left_out = [row.left_out for row in rows]
        values = group_advantages(totals, groups, std="population", leave_out=left_out, eps=0.0)
        return Advantages(rows=values)

    parts = SimpleNamespace(
        advantage=advantage,
        credit=Tapo(TapoOptions()),
        reference=list,
        exchange=Kept(budget_tokens=100_000),
    )
    schedule = SimpleNamespace(
        questions_per_step=1,
        updates_per_batch=1,
        epochs=1,
        recompute_old_logprobs=False,
        drop_uniform_groups=False,
        skip_idle_rows=False,
    )
    return Trainer(cast(Parts, parts), cast(Schedule, schedule))


def test_the_policy_reads_what_is_its_doing_or_meant_and_the_rest_ends_the_trajectory(
    chat: ChatFormat, outcome: Outcome
) -> None:
    met = play(chat, outcome).trajectories[1]
    (call,) = met.turns[0].calls
    assert call.outcome is outcome and call.executed
    assert call.valid is (outcome is not Outcome.MODEL_ERROR)
    goes_on = outcome in READ_BY_THE_POLICY
    assert met.stop is (StopReason.ANSWER if goes_on else StopReason.INFRA)
    assert (met.turns[0].observation_span is not None) is goes_on
    assert len(met.turns) == (2 if goes_on else 1)


def test_only_the_policys_own_error_costs_the_reward_of_form(
    chat: ChatFormat, outcome: Outcome
) -> None:
    met = play(chat, outcome).trajectories[1]
    form = reward_of(met).parts["format"]
    if outcome in READ_BY_THE_POLICY:
        assert form == (0.0 if outcome is Outcome.MODEL_ERROR else 1.0)


def test_baseline_credit_and_loss_know_the_outcome(chat: ChatFormat, outcome: Outcome) -> None:
    run = trainer()
    groups = [play(chat, outcome)]
    batch = run._advantages(groups, [0])
    stays = outcome in READ_BY_THE_POLICY
    up, down = POPULATION[4 if stays else 3]
    own = down if stays else 0.0
    np.testing.assert_allclose(batch.advantages.rows, [up, own, down, down], atol=1e-6)
    assert batch.trained == [True, stays, True, True]
    credit = run._credit(batch)
    turns = credit.step_advantages[1]
    if stays:
        # The success made the same call: its worth cuts the blame to 0, unless the call was
        # the policy's own error. The answer keeps its blame.
        call = down if outcome is Outcome.MODEL_ERROR else 0.0
        np.testing.assert_allclose(list(turns), [call, down], atol=1e-6)
    else:
        np.testing.assert_allclose(list(turns), [0.0], atol=0)
    ((micro_batch,),), _ = run._cut(0, batch, credit)
    trajectories = groups[0].trajectories
    in_loss = [t for t, trained in zip(trajectories, batch.trained, strict=True) if trained]
    assert sorted(micro_batch.row_ids) == sorted(t.id for t in in_loss)
    sampled = sum(len(turn.span) for t in in_loss for turn in t.turns)
    assert len(micro_batch.advantages) == sampled


def test_a_call_that_failed_is_no_reference_for_others(chat: ChatFormat, outcome: Outcome) -> None:
    """The attempt that met the failure is right in the end; the one that did not, is wrong."""
    met, other = swapped(play(chat, outcome))
    if met.failed_outside_policy:
        return
    run = trainer()
    group = Group(task=met.task, trajectories=(met, other))
    batch = run._advantages([group], [0])
    (call, answer) = run._credit(batch).step_advantages[1]
    assert answer == pytest.approx(-1.0)
    assert call == pytest.approx(-1 + BETA if outcome is Outcome.OK else -1.0)


def swapped(group: Group) -> tuple[Trajectory, Trajectory]:
    """The attempt with the failing call, now right, and the other, now wrong."""
    first, second = group.trajectories[:2]
    met, other = replace(second, answer="Velor"), replace(first, answer="Miko")
    return met.with_reward(reward_of(met, form=0.0)), other.with_reward(reward_of(other, form=0.0))


def test_outcomes_are_shares_of_all_calls_in_the_metrics(
    chat: ChatFormat, outcome: Outcome
) -> None:
    metrics = combine([trajectory_sums([play(chat, outcome)])])
    assert metrics["rollout/outcome/ok"] == (1.0 if outcome is Outcome.OK else 0.5)
    assert metrics[f"rollout/outcome/{outcome}"] == (1.0 if outcome is Outcome.OK else 0.5)
    assert metrics["rollout/failed_outside_policy"] == (
        0.0 if outcome in READ_BY_THE_POLICY else 0.25
    )
