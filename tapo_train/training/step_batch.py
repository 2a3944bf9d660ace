"""A step's scored trajectories, and which of them each update learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tapo_train.algos.advantages import informative_rows
from tapo_train.algos.turn_advantages import Advantages, RewardRow
from tapo_train.credit.result import CreditResult, token_advantages
from tapo_train.credit.steps import CreditRow, from_trajectory
from tapo_train.learner import distributed
from tapo_train.learner.batch import TrainingRow
from tapo_train.training.parts import AdvantageFunction
from tapo_train.types import Group, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """This rank's scored trajectories with their advantages."""

    trajectories: list[Trajectory]
    question: list[int]
    """Position of each trajectory's question in the step's global batch."""
    advantages: Advantages
    """[N] as the group gave them, and of the turns where these differ."""
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
    own = [reward_row(trajectory) for trajectory in trajectories]
    ranks = distributed.all_gather_objects(own)
    rows = [row for rank in ranks for row in rank]
    everywhere = advantage(rows)
    trained = [not row.left_out for row in rows]
    if drop_uniform_groups:
        trained = informative(rows, everywhere)
    start = sum(len(rank) for rank in ranks[: distributed.rank()])
    return Batch(
        trajectories=trajectories,
        question=question,
        advantages=everywhere.part(start, start + len(own)),
        trained=trained[start : start + len(own)],
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


def reward_row(trajectory: Trajectory) -> RewardRow:
    """What the advantage stage sees of a trajectory."""
    left_out = trajectory.failed_outside_policy
    reward = None if left_out else trajectory.scored()
    return RewardRow(
        group=trajectory.task.id,
        total=reward.total if reward else 0.0,
        tokens=tuple(len(turn.span) for turn in trajectory.turns),
        turn_rewards=reward.turns if reward else (),
        left_out=left_out,
    )


def credit_rows(batch: Batch) -> list[CreditRow]:
    """What the credit stage sees of a batch."""
    found = batch.advantages
    turns = [()] * len(found.rows) if found.turns is None else [t.tolist() for t in found.turns]
    return [
        from_trajectory(trajectory, advantage, own)
        for trajectory, advantage, own in zip(
            batch.trajectories, found.rows.tolist(), turns, strict=True
        )
    ]


def informative(rows: Sequence[RewardRow], found: Advantages) -> list[bool]:
    """Rows of questions that teach something: totals that differ, or a turn unlike another."""
    left_out = [row.left_out for row in rows]
    differ = informative_rows([r.total for r in rows], [r.group for r in rows], leave_out=left_out)
    if found.turns is None:
        return [bool(flag) for flag in differ]
    taught = {row.group for row, own in zip(rows, found.turns, strict=True) if own.any()}
    return [row.group in taught and not row.left_out for row in rows]
