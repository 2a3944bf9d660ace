"""What the validation questions showed: measured on those that were played to their end.

A question whose tools broke says nothing about the policy. It is left out of every metric but
`eval/failed`, and cannot make a checkpoint the best.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tapo_train.errors import TapoError
from tapo_train.learner import distributed
from tapo_train.report.statistics import accuracy_of
from tapo_train.report.trajectory_metrics import most_frequent_sources
from tapo_train.rollout.failures import Failures, failures_of
from tapo_train.training.audit import RolloutAudit
from tapo_train.types import Trajectory

__all__ = ["Validation", "validated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """What a validation came to; the same on all ranks."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    score: float | None = None
    """The accuracy if every question that failed outside the policy had been answered wrongly:
    what checkpoints are compared by, so that an outage never makes one the best. None if too
    many failed."""
    error: TapoError | None = None
    """Why the run cannot go on after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answered:
    """What counts of a question that was played to its end."""

    source: str
    accuracy: float
    form: float | None
    """None where form is no part of the reward."""
    turns: int
    calls: int


def validated(trajectories: Sequence[Trajectory], audit: RolloutAudit) -> Validation:
    """Judge this rank's scored trajectories together with the others'; every rank calls it.

    Says on rank 0 how many questions were left out and why.
    """
    own = [_answered(t) for t in trajectories if not t.failed_outside_policy]
    ranks = distributed.all_gather_objects((len(trajectories), own, failures_of(trajectories)))
    asked = sum(num for num, _, _ in ranks)
    rows = [row for _, rows, _ in ranks for row in rows]
    failures = sum((found for _, _, found in ranks), start=Failures())
    error = audit.of_validation(failures)
    left_out = asked - len(rows)
    if left_out and error is None and distributed.rank() == 0:
        print(f"validation: {_left_out(left_out, asked, failures)}", flush=True)
    right = math.fsum(row.accuracy for row in rows)
    return Validation(
        metrics=evaluation_metrics(rows, asked=asked),
        score=right / asked if rows and error is None else None,
        error=error,
    )


def _left_out(num: int, asked: int, failures: Failures) -> str:
    return (
        f"{num} of {asked} questions failed outside the policy and are not counted; "
        f"{failures.words()}"
    )


def _answered(trajectory: Trajectory) -> _Answered:
    reward = trajectory.scored()
    return _Answered(
        source=trajectory.task.source,
        accuracy=reward.accuracy,
        form=reward.parts.get("format"),
        turns=len(trajectory.turns),
        calls=sum(len(turn.calls) for turn in trajectory.turns),
    )


def evaluation_metrics(rows: Sequence[_Answered], *, asked: int) -> dict[str, float]:
    """Accuracy with its interval, form, calls and turns over `rows`, the usable ones of `asked`.

    Without a usable one there is nothing to say but that.
    """
    counts = {"eval/questions": float(asked), "eval/failed": (asked - len(rows)) / max(asked, 1)}
    if not rows:
        return counts
    accuracy = float(np.mean([row.accuracy for row in rows]))
    form = [row.form for row in rows if row.form is not None]
    interval = accuracy_of(int(math.fsum(row.accuracy for row in rows)), len(rows))
    return counts | {
        "eval/accuracy": accuracy,
        "eval/accuracy_low": interval.low,
        "eval/accuracy_high": interval.high,
        "eval/turns": float(np.mean([row.turns for row in rows])),
        "eval/calls": float(np.mean([row.calls for row in rows])),
        **({"eval/format": float(np.mean(form))} if form else {}),
        **_by_source(rows),
    }


def _by_source(rows: Sequence[_Answered]) -> dict[str, float]:
    """Accuracy of each data set's questions, where they are of several."""
    held: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        held[row.source].append(row.accuracy)
    names = most_frequent_sources({source: len(own) for source, own in held.items()})
    return {f"eval/accuracy/{name}": float(np.mean(held[source])) for source, name in names}
