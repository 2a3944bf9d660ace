"""Stages between rollout and advantage that see whole groups and may ask the policy itself.

A reward judges one trajectory and knows no model. What is added here needs more: a filter that
leaves trajectories out of loss and baseline, a reward by turn that asks the learner for
log-probabilities, or the engine for answers to a thought that is cut short. Sampler and learner
hold the same weights then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from tapo_train.algos.advantages import Floats
from tapo_train.errors import TapoError
from tapo_train.learner import distributed
from tapo_train.learner.batch import TrainingRow, join, pack_numbers
from tapo_train.learner.policy import Policy
from tapo_train.learner.scorer import RAW
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.driver import EngineDriver
from tapo_train.rollout.engine import Completion, Engine, GenerationRequest, Sampling
from tapo_train.rollout.group import Score
from tapo_train.types import Group, Reward, Trajectory

__all__ = ["PolicyAccess", "Process", "Processes", "earning"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyAccess:
    """What a stage may ask the policy as it is at this step."""

    chat: ChatFormat
    policy: Policy
    engine: Engine
    score: Score
    """Gives a trajectory without a reward its reward, all parts of it."""
    sampling: Sampling
    """As the recipe samples."""
    budget_tokens: int
    """Of a micro-batch of the learner."""
    driver: EngineDriver | None = None
    """Of the engine, where a thread of its own steps it."""

    def logprobs(self, rows: Sequence[TrainingRow]) -> list[Floats]:
        """[K] of each row's trained tokens: at temperature 1, nothing banned.

        On all ranks together, each with as many rows as it likes, none included. A row costs a
        forward pass over all its tokens.
        """
        sequence = self.policy.sequence
        shares = sequence.objects(list(rows))
        held = [row for share in shares for row in share]
        packs = pack_numbers(held, budget_tokens=self.budget_tokens)
        batches = [join([held[i] for i in numbers]) for numbers in packs]
        answers = self.policy.logprobs_of_all(batches, distribution=RAW)
        found: dict[int, Floats] = {}
        for numbers, answer in zip(packs, answers, strict=True):
            ends = np.cumsum([held[i].num_trained for i in numbers])
            pieces = np.split(answer.double().numpy(), ends[:-1])
            found |= dict(zip(numbers, pieces, strict=True))
        first = sum(map(len, shares[: sequence.index]))
        return [found[first + number] for number in range(len(rows))]

    def sample(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """What the engine samples for each request of this rank, in order."""
        driver = self.driver or EngineDriver(self.engine, end_token_id=self.chat.end_token_id)

        async def ask() -> list[Completion]:
            return await asyncio.gather(*map(driver.generate, requests))

        return driver.drive(ask()) if requests else []

    def accuracies(self, trajectories: Sequence[Trajectory]) -> list[float | None]:
        """Correctness of what never had a reward, by its answer; None where the reward failed."""

        async def ask() -> list[Trajectory]:
            return await asyncio.gather(*map(self.score, trajectories))

        rewards = [scored.reward for scored in asyncio.run(ask())]
        return [None if reward is None else reward.accuracy for reward in rewards]


Process = Callable[[Sequence[Trajectory], PolicyAccess], Sequence[Trajectory]]
"""A stage with its arguments bound: this rank's trajectories, whole groups, to as many in the same
order. On all ranks together. One that it leaves out gets `unscored`, a word that says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Processes:
    """The stages of a recipe, one after the other; none is the usual case."""

    stages: Sequence[Process]
    access: PolicyAccess

    def __call__(self, groups: Sequence[Group]) -> tuple[list[Group], dict[str, float]]:
        """Groups with what the stages made of their trajectories, and what that came to.

        Raises:
            TapoError: a stage gives other trajectories than it was given.
        """
        if not self.stages:
            return list(groups), {}
        before = [t for group in groups for t in group.trajectories]
        after = before
        for stage in self.stages:
            given, after = after, list(stage(after, self.access))
            if [t.id for t in given] != [t.id for t in after]:
                raise TapoError("reward.process: a stage gave other trajectories than it got")
        rest = iter(after)
        changed = [
            replace(group, trajectories=tuple(islice(rest, len(group.trajectories))))
            for group in groups
        ]
        return changed, _metrics(before, after)


def earning(trajectory: Trajectory, turns: Sequence[float], *, part: str) -> Trajectory:
    """The trajectory with further rewards of its turns, under the name of a part of its reward.

    Args:
        turns: [turns] added to the total as well.

    Raises:
        TapoError: another number of turns.
    """
    if len(turns) != len(trajectory.turns):
        raise TapoError(f"{part}: {len(turns)} rewards for {len(trajectory.turns)} turns")
    reward, added = trajectory.scored(), float(sum(turns))
    before = reward.turns or (0.0,) * len(turns)
    earned = Reward(
        total=reward.total + added,
        accuracy=reward.accuracy,
        parts={**reward.parts, part: added},
        turns=tuple(a + b for a, b in zip(before, turns, strict=True)),
    )
    return trajectory.with_reward(earned)


def _metrics(before: Sequence[Trajectory], after: Sequence[Trajectory]) -> dict[str, float]:
    """Over all ranks: how many were left out and why, and what further parts were earned."""
    sums = {"process/left_out": 0.0, "process/earned": 0.0, "process/steps": 0.0}
    for old, new in zip(before, after, strict=True):
        if new.failed_outside_policy and not old.failed_outside_policy:
            sums["process/left_out"] += 1
            reason = f"process/left_out/{new.unscored}"
            sums[reason] = sums.get(reason, 0.0) + 1
        elif new.reward is not None and old.reward is not None:
            sums["process/earned"] += new.reward.total - old.reward.total
            sums["process/steps"] += len(new.turns)
    ranks: list[tuple[int, dict[str, float]]] = distributed.all_gather_objects((len(after), sums))
    count = max(sum(number for number, _ in ranks), 1)
    names = sorted({name for _, own in ranks for name in own})
    return {name: sum(own.get(name, 0.0) for _, own in ranks) / count for name in names}
