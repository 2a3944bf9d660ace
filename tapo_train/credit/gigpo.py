"""GiGPO's step-level advantage, behind the same seam as TAPO.

Feng et al., "Group-in-Group Policy Optimization for LLM Agent Training", arXiv 2505.10978:

    A_t = A^E + omega A^S_t,    A^S_t = R_t - mean of R over the steps with the same anchor state
    R_t = gamma^(T - 1 - t) r   the reward at the end, discounted back to turn t

Steps of the same question whose policy saw the same state form a group; a step alone in its
group has A^S = 0. All trajectories take part, successful ones too. The state of turn 0 is the
question, that of a later turn what the tools answered to the turn before; where that was not
recorded the step stays alone.

Deviation: A^E is the advantage the rows come with (the recipe's kind), where the reference code
takes the mean over step rows of the group without dividing by a deviation.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import numpy as np

from tapo_train.credit.audit import answer_of
from tapo_train.credit.diagnostics import finish
from tapo_train.credit.options import check_choices, check_range
from tapo_train.credit.result import CreditResult, Floats, StepRecord, unchanged
from tapo_train.credit.steps import CreditRow

_STD_EPSILON = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class GiGPOOptions:
    """Options of `GiGPO`."""

    omega: float = 1.0
    """Weight of the step-level advantage; 0 is the base algorithm."""
    gamma: float = 0.95
    """Discount per turn, in [0, 1]."""
    divide_by_std: bool = False
    """Divide A^S by the population deviation of its group (the paper's first form)."""
    state_similarity: float = 1.0
    """Least difflib ratio of two states of one group, first fit; 1: equal states only."""

    def __post_init__(self) -> None:
        check_range("credit.omega", self.omega, low=0.0, high=float("inf"))
        check_range("credit.gamma", self.gamma, low=0.0, high=1.0)
        check_range("credit.state_similarity", self.state_similarity, low=0.0, high=1.0)
        check_choices("credit", self)


class GiGPO:
    """Group-in-group step advantages (arXiv 2505.10978)."""

    def __init__(self, options: GiGPOOptions) -> None:
        self.options = options

    def __call__(self, rows: Sequence[CreditRow]) -> CreditResult:
        """Add the step-level advantage to every turn of every row that was not discarded."""
        turns = [unchanged(row) for row in rows]
        places = [
            (i, t) for i, row in enumerate(rows) if not row.discarded for t in range(row.num_turns)
        ]
        labels = step_groups(rows, places, threshold=self.options.state_similarity)
        returns = np.array([step_return(rows[i], t, gamma=self.options.gamma) for i, t in places])
        step = relative(returns, labels, divide_by_std=self.options.divide_by_std)
        if self.options.omega > 0.0:
            for (i, t), value in zip(places, step.tolist(), strict=True):
                turns[i][t] += self.options.omega * value
        size = np.bincount(labels, minlength=1)
        sums = {
            "gigpo/steps": len(places),
            "gigpo/step_groups": len(np.unique(labels)),
            "gigpo/grouped": int((size[labels] > 1).sum()),
            "gigpo/step_adv_abs": float(np.abs(step).sum()),
        }
        return CreditResult(
            step_advantages=turns,
            call_advantages=[()] * len(rows),
            records=lambda: [
                _records(row, values) for row, values in zip(rows, turns, strict=True)
            ],
            metrics=finish(sums),
            sums=sums,
        )


def _records(row: CreditRow, turns: Floats) -> tuple[StepRecord, ...]:
    return tuple(StepRecord(step.turn, float(turns[step.turn])) for step in row.steps)


def step_return(row: CreditRow, turn: int, *, gamma: float) -> float:
    """Sum of gamma^(k - t) r_k from turn t on; what no turn claims of the reward is the last's.

    Correctness stands for the reward where none is known.
    """
    reward = row.correct if row.reward is None else row.reward
    outcome = reward - sum(row.turn_rewards)
    earned = sum(r * gamma**k for k, r in enumerate(row.turn_rewards[turn:]))
    return float(outcome * gamma ** (row.num_turns - 1 - turn) + earned)


def anchor_states(row: CreditRow) -> list[Hashable | None]:
    """Per turn, what the policy had just been told; None where that is not known."""
    states: list[Hashable | None] = [None] * row.num_turns
    if states:
        states[0] = "question"
    for step in row.steps:
        answers = tuple(answer_of(call) for call in step.calls)
        if step.turn + 1 < row.num_turns and None not in answers:
            states[step.turn + 1] = answers
    return states


def step_groups(
    rows: Sequence[CreditRow], places: Sequence[tuple[int, int]], *, threshold: float
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """[len(places)] group index of each (row, turn)."""
    states = [anchor_states(row) for row in rows]
    number: dict[Hashable, int] = {}
    leaders: dict[str, list[str]] = {}
    labels = []
    for i, t in places:
        state = states[i][t]
        if state is not None and threshold < 1.0:
            state = _leader(str(state), leaders.setdefault(rows[i].group, []), threshold)
        key = (i, t) if state is None else (rows[i].group, state)
        labels.append(number.setdefault(key, len(number)))
    return np.array(labels, dtype=np.int64)


def _leader(state: str, leaders: list[str], threshold: float) -> str:
    """The first earlier state that is similar enough, or this one as a new leader."""
    for leader in leaders:
        if leader == state or SequenceMatcher(None, leader, state).ratio() >= threshold:
            return leader
    leaders.append(state)
    return state


def relative(
    values: Floats, labels: np.ndarray[tuple[int], np.dtype[np.int64]], *, divide_by_std: bool
) -> Floats:
    """Values minus the mean of their group; a group of one gets 0."""
    count = np.maximum(np.bincount(labels), 1)
    mean = np.bincount(labels, values) / count
    centred: Floats = np.where(count[labels] > 1, values - mean[labels], 0.0)
    if divide_by_std:
        deviation = np.sqrt(np.bincount(labels, centred**2) / count)
        centred = centred / (deviation[labels] + _STD_EPSILON)
    return centred
