"""Validation and evaluation: what an outage leaves to say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tapo_train.errors import OutageError
from tapo_train.report.catalogue import require_known
from tapo_train.report.sinks import Console
from tapo_train.rollout.failures import FailureBudget
from tapo_train.tools.ledger import Ledger
from tapo_train.training.audit import RolloutAudit
from tapo_train.training.validation import validated
from tapo_train.types import (
    Observation,
    Outcome,
    Reward,
    Span,
    StopReason,
    Task,
    ToolCall,
    Trajectory,
    Turn,
)


def trajectory(
    accuracy: float, *, stop: StopReason = StopReason.ANSWER, source: str = ""
) -> Trajectory:
    """One search, which broke if `stop` is INFRA."""
    outcome = Outcome.INFRA_ERROR if stop is StopReason.INFRA else Outcome.OK
    call = ToolCall(
        name="search",
        arguments={},
        valid=True,
        executed=True,
        observation=Observation(text="connection refused", outcome=outcome),
    )
    return Trajectory(
        id="t",
        task=Task(id="q", question="?", images=(), answers=("a",), source=source),
        tokens=np.zeros(4, dtype=np.int32),
        logprobs=np.zeros(1, dtype=np.float32),
        turns=(Turn(index=0, span=Span(start=0, end=1), text="", calls=(call,)),),
        images=(),
        answer=None,
        stop=stop,
        reward=Reward(total=accuracy, accuracy=accuracy, parts={"format": 1.0}),
    )


def down(num: int) -> list[Trajectory]:
    """Wrong, but only because their search broke."""
    return [trajectory(0.0, stop=StopReason.INFRA)] * num


def audit(folder: Path, share: float = 0.5) -> RolloutAudit:
    return RolloutAudit(Ledger(), failures=FailureBudget(share), budget=None, folder=folder)


def test_a_question_whose_search_broke_is_in_no_metric_but_the_share_that_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    played = [trajectory(1.0), trajectory(1.0), trajectory(0.0), *down(1)]
    found = validated(played, audit(tmp_path))
    require_known(found.metrics)
    assert found.error is None
    assert found.metrics["eval/accuracy"] == pytest.approx(2 / 3)
    assert found.metrics["eval/questions"] == 4
    assert found.metrics["eval/failed"] == 0.25
    assert found.score == 0.5, "as if the question had been answered wrongly"
    assert capsys.readouterr().out == (
        "validation: 1 of 4 questions failed outside the policy and are not counted; "
        "calls that failed: search: 1 infra_error; most often (1 times) search said: "
        "'connection refused'\n"
    )


def test_a_whole_validation_says_nothing_and_is_compared_by_its_accuracy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = validated([trajectory(1.0), trajectory(0.5)], audit(tmp_path))
    assert found.score == found.metrics["eval/accuracy"] == 0.75
    assert found.metrics["eval/failed"] == 0.0
    assert capsys.readouterr().out == ""


def test_a_dead_search_gives_no_accuracy_no_best_and_the_end_of_the_run(tmp_path: Path) -> None:
    found = validated(down(40), audit(tmp_path))
    assert found.metrics == {"eval/questions": 40.0, "eval/failed": 1.0}
    assert found.score is None
    assert isinstance(found.error, OutageError)
    assert "40 of the last 40 trajectories failed" in str(found.error)
    assert "search said: 'connection refused'" in str(found.error)


def test_too_many_failures_leave_no_best_though_some_questions_were_answered(
    tmp_path: Path,
) -> None:
    found = validated([trajectory(1.0)] * 19 + down(21), audit(tmp_path))
    assert isinstance(found.error, OutageError)
    assert found.score is None
    assert found.metrics["eval/accuracy"] == 1.0
    assert found.metrics["eval/failed"] == 21 / 40


def test_small_validations_are_judged_together_and_apart_from_training(tmp_path: Path) -> None:
    judge = audit(tmp_path)
    first = validated(down(20), judge)
    assert first.error is None and first.score is None
    assert isinstance(validated(down(12), judge).error, OutageError)


def test_a_late_question_is_left_out_but_is_no_outage(tmp_path: Path) -> None:
    late = [trajectory(0.0, stop=StopReason.DEADLINE)] * 40
    found = validated([trajectory(1.0), *late], audit(tmp_path))
    assert found.error is None
    assert found.metrics["eval/accuracy"] == 1.0
    assert found.score == 1 / 41


def test_the_console_says_how_much_of_a_validation_failed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console = Console(total_steps=2)
    console.write(0, {"eval/accuracy": 0.5, "eval/failed": 0.25})
    console.write(1, {"eval/accuracy": 0.5, "eval/failed": 0.0})
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step 1/2  validation 0.500  25% of the validation failed"
    assert "failed" not in second
