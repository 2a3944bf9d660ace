"""What a credit assigner returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tapo_train.credit.steps import CreditRow
from tapo_train.errors import CreditError
from tapo_train.types import Span, Trajectory

Floats = npt.NDArray[np.float64]


class StepRecord(NamedTuple):
    """What happened to one tool step. Of a step with several calls, the best call's numbers:
    highest transfer, then highest similarity."""

    turn: int
    advantage: float
    """After the correction."""
    eligible: bool = False
    """A valid tool step of a failing trajectory."""
    theta: bool = False
    """Some call's best cluster is at least theta similar."""
    alpha: bool = False
    """Some call's similarity x support reaches alpha_min."""
    matched: bool = False
    """Some call passed every gate."""
    similarity: float | None = None
    """To the best cluster; None where no success used the tool."""
    support: float | None = None
    reference_advantage: float | None = None
    transfer: float = 0.0
    """Reduced over the calls of the step, before beta."""
    clipped: bool = False
    """Cut at zero."""


class CallAdvantage(NamedTuple):
    """An advantage of the tokens of one `<tool_call>…</tool_call>`, instead of its turn's."""

    turn: int
    call: int
    """0-based among all calls of the turn."""
    advantage: float


@dataclass(frozen=True, kw_only=True)
class CreditResult:
    """Advantages after credit assignment, row by row as the rows came in."""

    step_advantages: list[Floats]
    """Per row [num_turns] float64: the advantage of every turn's tokens."""
    call_advantages: list[tuple[CallAdvantage, ...]]
    """Per row: exceptions for the tokens of single calls; usually empty."""
    records: Callable[[], list[tuple[StepRecord, ...]]] = field(repr=False)
    """Makes `steps`."""
    metrics: dict[str, float]
    """Finished diagnostics of these rows alone."""
    sums: Mapping[str, float] = field(default_factory=dict)
    """The additive counts behind `metrics`: sum over ranks, then `diagnostics.finish`."""

    @cached_property
    def steps(self) -> list[tuple[StepRecord, ...]]:
        """Per row, one record per tool step; made when first asked for."""
        return self.records()


def unchanged(row: CreditRow) -> Floats:
    """[turns] the advantages that the row came with."""
    if row.turn_advantages:
        return np.array(row.turn_advantages, dtype=np.float64)
    return np.full(row.num_turns, row.advantage, dtype=np.float64)


def plain_records(rows: Sequence[CreditRow]) -> list[tuple[StepRecord, ...]]:
    """Records of rows whose steps nothing corrected."""
    return [_plain(row) for row in rows]


def _plain(row: CreditRow) -> tuple[StepRecord, ...]:
    return tuple(StepRecord(step.turn, row.advantage_at(step.turn)) for step in row.steps)


def result_of(
    rows: Sequence[CreditRow], turns: Sequence[Floats], *, sums: Mapping[str, float] | None = None
) -> CreditResult:
    """The result of a stage that is done when it knows the advantage of every turn.

    Args:
        turns: per row [num_turns].
        sums: additive counts, if there are any.

    Raises:
        CreditError: another number of rows or turns, or a number that is not finite.
    """
    if len(turns) != len(rows):
        raise CreditError(f"credit: advantages of {len(turns)} rows; wanted {len(rows)}")
    for row, values in zip(rows, turns, strict=True):
        if values.shape != (row.num_turns,) or not np.isfinite(values).all():
            raise CreditError(
                f"credit: row {row.id!r} got {values.tolist()}; wanted {row.num_turns} finite "
                "numbers, one per turn"
            )

    def records() -> list[tuple[StepRecord, ...]]:
        return [
            tuple(StepRecord(step.turn, float(values[step.turn])) for step in row.steps)
            for row, values in zip(rows, turns, strict=True)
        ]

    return CreditResult(
        step_advantages=list(turns),
        call_advantages=[()] * len(rows),
        records=records,
        metrics={},
        sums=sums or {},
    )


def token_advantages(
    trajectory: Trajectory, turns: Floats, calls: Sequence[CallAdvantage] = ()
) -> Floats:
    """[K] float64 advantages of the sampled tokens of a trajectory, in order.

    Every token of a turn (thought, calls, end token) has the turn's advantage, except the
    tokens of calls that have their own. Spans are clipped to the kept tokens; a call without a
    recorded span has no tokens of its own.
    """
    kept = len(trajectory.tokens)
    dense = np.zeros(kept, dtype=np.float64)
    for turn, advantage in zip(trajectory.turns, turns, strict=True):
        dense[turn.span.start : turn.span.end] = advantage
    for call in calls:
        span: Span | None = trajectory.turns[call.turn].calls[call.call].span
        if span is not None:
            dense[span.start : span.end] = call.advantage
    parts = [dense[turn.span.start : turn.span.end] for turn in trajectory.turns]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float64)
