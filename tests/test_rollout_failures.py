"""Failures outside the policy: counted, quoted, and the end of the run when they are too many."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from tapo_train.errors import RolloutError
from tapo_train.rollout.failures import FailureBudget, Failures, failures_of
from tapo_train.types import (
    Observation,
    Outcome,
    Span,
    StopReason,
    Task,
    ToolCall,
    Trajectory,
    Turn,
)


def trajectory(*calls: tuple[str, Outcome, str], stop: StopReason) -> Trajectory:
    turns = tuple(
        Turn(
            index=index,
            span=Span(start=index, end=index + 1),
            text="",
            calls=(
                ToolCall(
                    name=tool,
                    arguments={},
                    valid=True,
                    executed=True,
                    observation=Observation(text=text, outcome=outcome),
                ),
            ),
        )
        for index, (tool, outcome, text) in enumerate(calls)
    )
    return Trajectory(
        id="t",
        task=Task(id="q", question="?", images=(), answers=("a",)),
        tokens=np.zeros(9, dtype=np.int32),
        logprobs=np.zeros(len(turns), dtype=np.float32),
        turns=turns,
        images=(),
        answer=None,
        stop=stop,
    )


def step(failed: int, trajectories: int, message: str = "502") -> Failures:
    return Failures(
        trajectories=trajectories,
        failed=failed,
        calls=Counter({("search", "infra_error"): failed}),
        messages=Counter({("search", message): failed}),
    )


def test_failures_are_counted_by_tool_and_outcome_and_quoted_where_they_ended_something() -> None:
    found = failures_of(
        [
            trajectory(
                ("zoom", Outcome.OK, "fine"),
                ("search", Outcome.INFRA_ERROR, "502" + "x" * 400),
                stop=StopReason.INFRA,
            ),
            trajectory(("search", Outcome.TOOL_ERROR, "not this"), stop=StopReason.ANSWER),
            trajectory(("search", Outcome.MODEL_ERROR, "yours"), stop=StopReason.ANSWER),
            trajectory(("zoom", Outcome.TIMEOUT, "late"), stop=StopReason.INFRA),
            trajectory(stop=StopReason.MAX_TOKENS),
        ]
    )
    assert (found.trajectories, found.failed) == (5, 2)
    assert found.calls == {
        ("search", "infra_error"): 1,
        ("search", "tool_error"): 1,
        ("zoom", "timeout"): 1,
    }
    assert found.messages == {("search", "502" + "x" * 297): 1, ("zoom", "late"): 1}


def test_counts_of_ranks_add_up() -> None:
    both = step(3, 40) + step(5, 24, "503")
    assert (both.trajectories, both.failed) == (64, 8)
    assert both.calls == {("search", "infra_error"): 8}
    assert both.messages == {("search", "502"): 3, ("search", "503"): 5}


def test_a_share_up_to_the_budget_is_borne_and_one_more_is_not() -> None:
    budget = FailureBudget(0.25)
    budget.check(step(10, 40))
    with pytest.raises(RolloutError) as caught:
        budget.check(step(11, 40, "503 Service Unavailable"))
    assert str(caught.value) == (
        "rollout.max_failed_fraction: 11 of the last 40 trajectories failed outside the policy, "
        "wanted at most 0.25 of them; calls that failed: search: 11 infra_error; most often "
        "(11 times) search said: '503 Service Unavailable'"
    )


def test_a_small_batch_is_judged_together_with_those_before_it() -> None:
    budget = FailureBudget(0.5)
    for _ in range(7):
        budget.check(step(4, 4))
    with pytest.raises(RolloutError, match="32 of the last 32 trajectories"):
        budget.check(step(4, 4))


def test_what_lies_further_back_is_forgotten() -> None:
    budget = FailureBudget(0.5)
    for failed in (4, 4, 4, 4, 0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4):
        budget.check(step(failed, 4))
    with pytest.raises(RolloutError, match="20 of the last 32"):
        budget.check(step(4, 4))


def test_a_budget_of_one_bears_everything_and_of_zero_nothing() -> None:
    FailureBudget(1.0).check(step(64, 64))
    FailureBudget(0.0).check(step(0, 64))
    with pytest.raises(RolloutError):
        FailureBudget(0.0).check(step(1, 64))


def test_failures_without_a_tool_say_so() -> None:
    with pytest.raises(RolloutError, match="calls that failed: none; no tool said why"):
        FailureBudget(0.5).check(Failures(trajectories=64, failed=64))


def test_trajectories_that_a_deadline_cut_are_not_judged() -> None:
    late = [trajectory(stop=StopReason.DEADLINE)] * 40
    done = [trajectory(stop=StopReason.ANSWER)] * 20
    down = [trajectory(("search", Outcome.INFRA_ERROR, "502"), stop=StopReason.INFRA)] * 15
    counted = failures_of([*late, *done, *down])
    assert (counted.trajectories, counted.failed) == (35, 15)
    assert set(counted.messages) == {("search", "502")}
    FailureBudget(0.1).check(failures_of(late))
    with pytest.raises(RolloutError, match="15 of the last 35"):
        FailureBudget(0.4).check(counted)
    FailureBudget(0.45).check(counted)
