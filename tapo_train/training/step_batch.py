"""A step's scored trajectories, and which of them each update learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tapo_train.algos.advantages import informative_rows
from tapo_train.credit.result import CreditResult, token_advantages
from tapo_train.learner import distributed
from tapo_train.learner.batch import TrainingRow
from tapo_train.training.parts import AdvantageFunction, Floats
from tapo_train.types import Group, Trajectory


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


def compared(
    groups: Sequence[Group],
    questions: Sequence[int],
    advantage: AdvantageFunction,
    *,
    drop_uniform_groups: bool,
) -> Batch:
    """This rank's groups with their advantages over the rows of all ranks; all ranks call it.

    Args:
        groups: scored.
        questions: position of each group's question in the step's global batch.
        drop_uniform_groups: leave groups out of the loss whose rewards are all equal.
    """
    trajectories = [t for group in groups for t in group.trajectories]
    question = [q for group, q in zip(groups, questions, strict=True) for _ in group.trajectories]
    own = [(t.scored().total, t.task.id, t.failed_outside_policy) for t in trajectories]
    ranks = distributed.all_gather_objects(own)
    rewards, group_of, left_out = zip(*(row for rows in ranks for row in rows), strict=True)
    everywhere = advantage(np.array(rewards), group_of, left_out)
    trained = ~np.array(left_out)
    if drop_uniform_groups:
        trained = informative_rows(rewards, group_of, leave_out=left_out)
    start = sum(len(rows) for rows in ranks[: distributed.rank()])
    return Batch(
        trajectories=trajectories,
        question=question,
        advantages=everywhere[start : start + len(own)],
        trained=trained[start : start + len(own)].tolist(),
    )


def rows_of_updates(
    batch: Batch, credit: CreditResult, *, version: int, updates: int, questions: int
) -> list[list[TrainingRow]]:
    """This rank's rows of each update: contiguous questions, the same for any number of ranks.

    Args:
        version: of the weights that are about to learn.
        updates: optimizer updates the step's questions are dealt out to.
        questions: of the step, over all ranks.
    """
    cuts: list[list[TrainingRow]] = [[] for _ in range(updates)]
    for row, trajectory in enumerate(batch.trajectories):
        if batch.trained[row]:
            turns, calls = credit.step_advantages[row], credit.call_advantages[row]
            advantages = token_advantages(trajectory, turns, calls)
            share = batch.question[row] * updates // questions
            cuts[share].append(TrainingRow.from_tokens(trajectory, advantages, version=version))
    return cuts
