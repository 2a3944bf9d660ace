"""How a run ends early: what is saved before, and that it is whole before a rank leaves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tapo_train.data.sampler import TaskSampler
from tapo_train.errors import CollapseError, OutageError, TapoError, ToolBudgetError
from tapo_train.report.warnings import Watch
from tapo_train.rollout.failures import FailureBudget
from tapo_train.tools.ledger import Ledger
from tapo_train.training.audit import RolloutAudit
from tapo_train.training.interruption import Interruption, StepGivenUp
from tapo_train.training.parts import Parts, Schedule
from tapo_train.training.rounds import Questions, Refill
from tapo_train.training.trainer import Trainer
from tapo_train.training.validation import Validation
from tapo_train.training.watchdog import Watchdog


class Written:
    """Checkpoints that only say what was asked of them."""

    has_failed = False

    def __init__(self) -> None:
        self.events: list[str] = []

    def save(self, step: int, state: Mapping[str, Any], score: float | None) -> None:
        self.events.append(f"save {step} {score}")

    def wait(self) -> None:
        self.events.append("wait")

    def load_latest(self) -> None:
        return None


class Rows:
    """A sink that keeps the steps it was given."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self.steps.append(step)

    def close(self) -> None:
        pass


class Given(Trainer):
    """A trainer whose steps and validations are given."""

    given_up: Exception | None = None
    validation_error: TapoError | None = None
    asked_at = -1

    def step(self, step: int) -> dict[str, float]:
        if self.given_up and step == 1:
            raise self.given_up
        self._parts.interruption.is_requested |= step == self.asked_at
        return {"rollout/calls": 1.0 + 9.0 * (step > 0)}

    def validate(self, policy_version: int) -> Validation:
        return Validation(metrics={"eval/failed": 1.0}, error=self.validation_error)


def trainer(folder: Path, written: Written, *, eval_every: int) -> Given:
    watch = Watch(early_steps=1, recent_steps=1, stop_on=["calls_exploding"], stop_after=1)
    parts = SimpleNamespace(
        order=TaskSampler("abcd", seed=0),
        rounds=Refill(cast(Questions, None), most=0),
        stateful={"watch": watch},
        watch=watch,
        watchdog=Watchdog(folder, stall_s=0),
        interruption=Interruption(),
        audit=RolloutAudit(
            Ledger(), failures=FailureBudget(0.5), budget=None, folder=folder / "spending"
        ),
        checkpoints=written,
    )
    schedule = SimpleNamespace(steps=9, eval_every=eval_every, save_every=0)
    return Given(cast(Parts, parts), cast(Schedule, schedule))


@pytest.mark.parametrize("error", [ToolBudgetError("all is spent"), OutageError("search is down")])
def test_a_step_whose_validation_ends_the_run_is_logged_and_saved_but_not_as_a_best(
    tmp_path: Path, error: TapoError
) -> None:
    written, rows = Written(), Rows()
    run = trainer(tmp_path, written, eval_every=1)
    run.validation_error = error
    with pytest.raises(type(error), match=str(error)):
        run._run(0, [rows])
    assert rows.steps == [0]
    assert written.events == ["save 0 None", "wait"]


def test_a_run_that_collapses_waits_for_its_checkpoint(tmp_path: Path) -> None:
    written = Written()
    run = trainer(tmp_path, written, eval_every=0)
    with pytest.raises(CollapseError, match="calls_exploding"):
        run._run(0, [])
    assert written.events == ["wait"]


@pytest.mark.parametrize(
    "reason", [StepGivenUp(), ToolBudgetError("no money"), OutageError("no money to search")]
)
def test_a_step_that_was_given_up_leaves_the_run_before_it(
    tmp_path: Path, reason: Exception
) -> None:
    written, rows = Written(), Rows()
    run = trainer(tmp_path, written, eval_every=0)
    run.given_up = reason
    if isinstance(reason, StepGivenUp):
        assert not run._run(0, [rows])
    else:
        with pytest.raises(type(reason), match="no money"):
            run._run(0, [rows])
    assert rows.steps == [0]
    assert written.events == ["save 0 None", "wait"]


def test_a_run_that_is_asked_to_stop_stops_and_one_that_is_over_is_done(tmp_path: Path) -> None:
    for asked_at, steps in ((0, [0]), (8, list(range(9)))):
        written, rows = Written(), Rows()
        run = trainer(tmp_path, written, eval_every=0)
        run._parts.watch._stop_on = ()
        run.asked_at = asked_at
        assert run._run(0, [rows]) is (asked_at == 8)
        assert rows.steps == steps
        assert written.events == [f"save {asked_at} None", "wait"]
