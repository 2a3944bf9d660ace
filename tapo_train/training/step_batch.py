"""A step's scored trajectories, and which of them each update learns from."""

from __future__ import annotations

from dataclasses import dataclass

from tapo_train.credit.result import CreditResult, token_advantages
from tapo_train.learner.batch import TrainingRow
from tapo_train.training.parts import Floats
from tapo_train.types import Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """This rank's scored trajectories with their advantages."""

    trajectories: list[Trajectory]
    question: list[int]
    """Position of each trajectory's question in the step's global batch."""
    advantages: Floats
    """[N] as the group gave them."""
    trained: list[bool]
    """Which trajectories take part in the loss."""


def rows_of_updates(
    batch: Batch, credit: CreditResult, *, updates: int, questions: int
) -> list[list[TrainingRow]]:
    """This rank's rows of each update: contiguous questions, the same for any number of ranks.

    Args:
        updates: optimizer updates the step's questions are dealt out to.
        questions: of the step, over all ranks.
    """
    cuts: list[list[TrainingRow]] = [[] for _ in range(updates)]
    for row, trajectory in enumerate(batch.trajectories):
        if batch.trained[row]:
            turns, calls = credit.step_advantages[row], credit.call_advantages[row]
            advantages = token_advantages(trajectory, turns, calls)
            share = batch.question[row] * updates // questions
            cuts[share].append(TrainingRow.from_tokens(trajectory, advantages))
    return cuts
