"""IGPO (arXiv 2510.14967): a turn earns what it adds to the probability of the accepted answer.

    reward:
      process: [{path: tapo_train.systems.igpo:InformationGain}]
    algo:
      advantage: {custom: {path: "tapo_train.systems.igpo:accumulated", arguments: {gamma: 1.0}}}

After each observation the accepted answer is written in place of the policy's next turn, and the
learner says how probable it is. A turn whose observation makes it likelier has found something, in
attempts that all fail, too. The last turn earns the outcome.

It costs a forward pass over the conversation so far for every turn, and one for the question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from tapo_train.algos.advantages import Floats, group_advantages
from tapo_train.algos.turn_advantages import RewardRow, returns_to_go
from tapo_train.learner.batch import TrainingRow
from tapo_train.rollout.chat import ChatFormat
from tapo_train.training.process import PolicyAccess, earning
from tapo_train.types import Span, Trajectory

__all__ = ["InformationGain", "accumulated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class InformationGain:
    """weight * (g_t - g_(t-1)) for turn t, g the mean over the accepted answer's tokens.

    Where there are several accepted answers, the first is asked for.
    """

    weight: float = 1.0
    of: Literal["log_probability", "probability"] = "log_probability"
    """g is the mean log-probability [nat], or its exponential, as in the paper: in [0, 1]."""
    form: str = "<answer>{answer}</answer>"
    """The turn in which the answer is asked for; only the answer's own tokens count."""

    def __call__(
        self, trajectories: Sequence[Trajectory], policy: PolicyAccess
    ) -> list[Trajectory]:
        """The trajectories with rewards of their turns; on all ranks together."""
        rows = [self._rows(trajectory, policy.chat) for trajectory in trajectories]
        asked = policy.logprobs([row for own in rows for row in own])
        means = iter([float(found.mean()) for found in asked])
        return [
            self._rewarded(trajectory, [next(means) for _ in own])
            for trajectory, own in zip(trajectories, rows, strict=True)
        ]

    def _rows(self, trajectory: Trajectory, chat: ChatFormat) -> list[TrainingRow]:
        """The conversation before each turn that got an observation, and after the last of them."""
        observed = [turn for turn in trajectory.turns if turn.observation_span is not None]
        if trajectory.failed_outside_policy or not observed:
            return []
        before, _, _ = self.form.partition("{answer}")
        answer = trajectory.task.answers[0]
        said = chat.assistant(self.form.replace("{answer}", answer))
        gold = chat.decode(said[:-1]).token_span(len(before), len(before) + len(answer))
        last = trajectory.turns[len(observed) :]
        shown = [turn.num_images_before for turn in (*observed, *last[:1])]
        ends = [trajectory.prompt_length, *_ends(trajectory)]
        shown += [len(trajectory.images)] * (len(ends) - len(shown))
        return [
            TrainingRow.supervised(
                id=f"{trajectory.id}~{end}",
                tokens=np.concatenate([trajectory.tokens[:end], said]),
                images=trajectory.images[:num_images],
                spans=(Span(start=end + gold.start, end=end + gold.end),),
            )
            for end, num_images in zip(ends, shown, strict=True)
        ]

    def _rewarded(self, trajectory: Trajectory, means: Sequence[float]) -> Trajectory:
        if not means:
            return trajectory
        values = means if self.of == "log_probability" else [float(np.exp(mean)) for mean in means]
        gains = [self.weight * (after - before) for before, after in pairwise(values)]
        gains += [0.0] * (len(trajectory.turns) - len(gains))
        return earning(trajectory, gains, part="information_gain")


def accumulated(rows: Sequence[RewardRow], *, gamma: float = 1.0) -> list[Floats]:
    """IGPO's advantages: turn rewards normalised over the group, then summed from each turn on.

        a_t = (r_t - mean_g) / (std_g + eps);  A_t = sum over k >= t of gamma^(k - t) a_k

    over all turns of the question's attempts; the last turn's reward holds the outcome.
    """
    rewards = [returns_to_go(row, gamma=0.0) for row in rows]
    flat = group_advantages(
        np.concatenate([np.zeros(0), *rewards]),
        [row.group for row in rows for _ in row.tokens],
        leave_out=[row.left_out for row in rows for _ in row.tokens],
    )
    found = np.split(flat, np.cumsum([len(row.tokens) for row in rows])[:-1])
    for advantages in found:
        for turn in range(len(advantages) - 2, -1, -1):
            advantages[turn] += gamma * advantages[turn + 1]
    return found


def _ends(trajectory: Trajectory) -> list[int]:
    return [turn.observation_span.end for turn in trajectory.turns if turn.observation_span]
