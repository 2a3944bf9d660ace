"""An idealised agent, to see where credit transfer should help before any run.

A chain of `length` choices among `choices`, each with a softmax of its own; choice 0 is right
everywhere and has the probability `start` at first. A chain of right choices is answered right
with probability 1 - late_failure, any other with probability `luck`. Groups of attempts, GRPO's
advantage with the unbiased deviation, one plain gradient step per batch. A call is the same as
another if it is the same choice at the same place; similarity is 0 or 1.

What it leaves out: states that depend on earlier choices, generalisation between places, questions
of different difficulty, tokens, Adam, clipping. It ranks settings; it predicts no run.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tapo_train.credit.controls import deal

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

BETA, ALPHA_MIN = 0.8, 0.25
"""Of the transfer, as in `TapoOptions`."""
_EPSILON = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One place of the phase diagram."""

    length: int = 4
    """Choices of a chain."""
    choices: int = 3
    start: float = 1 / 3
    """Probability of a right choice at first."""
    late_failure: float = 0.2
    """Share of right chains that are answered wrong."""
    luck: float = 0.05
    """Share of other chains that are answered right."""
    rollouts: int = 8
    """Attempts of a group."""
    groups: int = 16
    """Of a batch."""
    learning_rate: float = 1.0
    updates: int = 80


@dataclass(frozen=True, slots=True)
class Batch:
    """Attempts of S independent agents: [S, groups, G]."""

    advantage: Floats
    chosen: Indices
    """[S, groups, G, length]"""
    success: Flags
    choices: int

    def steps(self) -> Floats:
        """[S, groups, G, length] every step's advantage is its attempt's."""
        return np.repeat(self.advantage[..., None], self.chosen.shape[-1], axis=-1)


class Credit(Protocol):
    """Advantages of steps [S, groups, G, length]."""

    def __call__(self, batch: Batch) -> Floats:
        """Assign credit."""
        ...


def no_transfer(batch: Batch) -> Floats:
    """The baseline."""
    return batch.steps()


def tapo(batch: Batch) -> Floats:
    """A' = min(0, A + beta sup A+) for steps of failing attempts that successes share."""
    steps, success = batch.steps(), batch.success
    made = batch.chosen[..., None] == np.arange(batch.choices)  # [S, groups, G, length, choices]
    count = np.maximum(success.sum(axis=-1), 1)
    support = (made & success[..., None, None]).sum(axis=2) / count[..., None, None]
    of_step = np.take_along_axis(support[:, :, None], batch.chosen[..., None], axis=-1)[..., 0]
    best = np.where(success, batch.advantage, 0.0).max(axis=-1)[..., None, None]
    given = np.where(of_step >= ALPHA_MIN, of_step, 0.0) * best
    return np.where(steps < 0.0, np.minimum(0.0, steps + BETA * given), steps)


class Placebo:
    """The changes of `tapo` at random steps of failing attempts."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = random.Random(f"idealised/{seed}")

    def __call__(self, batch: Batch) -> Floats:
        steps = batch.steps()
        changes, blamed = tapo(batch) - steps, steps < 0.0
        for agent in range(len(steps)):
            where = blamed[agent]
            room = -steps[agent][where]
            steps[agent][where] += deal(changes[agent][where], room, self._rng)
        return steps


def shrink(batch: Batch) -> Floats:
    """All negative advantages of an agent times one factor, to the sum of `tapo`."""
    steps = batch.steps()
    negative = steps < 0.0
    before, after = (
        np.where(negative, values, 0.0).sum(axis=(1, 2, 3)) for values in (steps, tapo(batch))
    )
    factor = np.divide(after, before, out=np.ones_like(before), where=before < 0.0)
    return np.where(negative, steps * factor[:, None, None, None], steps)


def learning_curves(setting: Setting, credit: Credit, *, agents: int, seed: int = 0) -> Floats:
    """[agents, updates] the exact probability of success before each update."""
    rng = np.random.default_rng(seed)
    logits = np.zeros((agents, setting.length, setting.choices))
    logits[..., 0] = np.log(setting.start * (setting.choices - 1) / (1.0 - setting.start))
    answered = 1.0 - setting.late_failure
    curves = np.empty((agents, setting.updates))
    for update in range(setting.updates):
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        share = weights / weights.sum(axis=-1, keepdims=True)
        whole = share[..., 0].prod(axis=-1)
        curves[:, update] = whole * answered + (1.0 - whole) * setting.luck
        draws = rng.random((agents, setting.groups, setting.rollouts, setting.length, 1))
        bounds = share.cumsum(axis=-1)[:, None, None, :, :-1]
        chosen = (draws > bounds).sum(axis=-1)
        is_right = (chosen == 0).all(axis=-1)
        success = rng.random(is_right.shape) < np.where(is_right, answered, setting.luck)
        steps = credit(Batch(group_advantage(success), chosen, success, setting.choices))
        taken = chosen[..., None] == np.arange(setting.choices)
        gradient = (steps[..., None] * (taken - share[:, None, None])).mean(axis=(1, 2))
        logits += setting.learning_rate * gradient
    return curves


def group_advantage(success: Flags) -> Floats:
    """[..., G] (r - mean) / (unbiased std + eps)."""
    reward = success.astype(np.float64)
    centred = reward - reward.mean(axis=-1, keepdims=True)
    if reward.shape[-1] == 1:
        return np.zeros_like(centred)
    deviation = reward.std(axis=-1, ddof=1, keepdims=True)
    return np.asarray(centred / (deviation + _EPSILON))


def mean_success(setting: Setting, credit: Credit, *, agents: int, seed: int = 0) -> Floats:
    """[agents] mean of each learning curve: the area under it per update."""
    return np.asarray(learning_curves(setting, credit, agents=agents, seed=seed).mean(axis=1))
