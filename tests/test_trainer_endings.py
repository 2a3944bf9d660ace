"""How a run ends early: what is saved before, and that it is whole before a rank leaves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tapo_train.data.sampler import TaskSampler
from tapo_train.errors import CollapseError, ToolBudgetError
from tapo_train.report.warnings import Watch
from tapo_train.training.interruption import Interruption
from tapo_train.training.parts import Parts, Schedule
from tapo_train.training.rounds import OneRound, Questions
from tapo_train.training.trainer import Trainer
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

    def step(self, step: int) -> dict[str, float]:
        return {"rollout/calls": 1.0 + 9.0 * (step > 0)}

    def validate(self, policy_version: int) -> dict[str, float]:
        raise ToolBudgetError("all is spent")


def trainer(folder: Path, written: Written, *, eval_every: int) -> Given:
    watch = Watch(early_steps=1, recent_steps=1, stop_on=["calls_exploding"], stop_after=1)
    parts = SimpleNamespace(
        order=TaskSampler(4, seed=0),
        rounds=OneRound(cast(Questions, None)),
        stateful={"watch": watch},
        watch=watch,
        watchdog=Watchdog(folder, stall_s=0),
        interruption=Interruption(),
        checkpoints=written,
    )
    schedule = SimpleNamespace(steps=9, eval_every=eval_every, save_every=0)
    return Given(cast(Parts, parts), cast(Schedule, schedule))


def test_a_step_whose_validation_could_not_be_paid_for_is_logged_and_saved(tmp_path: Path) -> None:
    written, rows = Written(), Rows()
    with pytest.raises(ToolBudgetError, match="all is spent"):
        trainer(tmp_path, written, eval_every=1)._one(0, [rows])
    assert rows.steps == [0]
    assert written.events == ["save 0 None", "wait"]


def test_a_run_that_collapses_waits_for_its_checkpoint(tmp_path: Path) -> None:
    written = Written()
    run = trainer(tmp_path, written, eval_every=0)
    assert run._one(0, [])
    with pytest.raises(CollapseError, match="calls_exploding"):
        run._one(1, [])
    assert written.events == ["wait"]
