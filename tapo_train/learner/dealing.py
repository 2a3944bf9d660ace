"""Which rank trains which rows in which micro-batch, so that no micro-step waits long.

Sharded gradients (and weights) bring the ranks together after every micro-batch. What counts is
therefore not how even the ranks' sums are, but the most costly micro-batch of each micro-step.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np

from tapo_train.learner.batch import best_fit

Dealt = list[list[list[int]]]
"""By rank, then by micro-step: the numbers of the rows of a micro-batch."""

SPARE_STEPS = 1
"""Micro-steps above the fewest possible that are tried: room makes costs even."""


def deal(
    costs: Sequence[float],
    lengths: Sequence[int],
    *,
    budget_tokens: int,
    num_ranks: int,
    home: Sequence[int],
) -> Dealt:
    """The cut whose micro-steps take the least time together, of a few good ones.

    Args:
        costs: of all rows of the step, >= 0, the same on every rank.
        lengths: [tokens] of the same rows; one longer than the budget goes alone.
        budget_tokens: of a micro-batch.
        home: where each row is now; it stays there where that costs nothing.
    """
    full = best_fit(lengths, budget_tokens=budget_tokens)
    fewest = ceil(len(full) / num_ranks)
    tried = [_neighbours(costs, full, num_ranks=num_ranks)]
    for steps in range(fewest, fewest + 1 + SPARE_STEPS) if full else ():
        even = _even(costs, lengths, home, budget=budget_tokens, ranks=num_ranks, steps=steps)
        tried += [even] if even else []
    return min(tried, key=lambda dealt: _waited(costs, dealt))


def rank_of(dealt: Dealt, *, count: int) -> list[int]:
    """The rank of each of `count` rows."""
    ranks = [0] * count
    for rank, batches in enumerate(dealt):
        for i in (i for rows in batches for i in rows):
            ranks[i] = rank
    return ranks


def evenness(costs: Sequence[float], dealt: Dealt) -> float:
    """What the ranks wait for, over their mean work: 1 is even, an update's time grows with it."""
    mean = sum(costs) / len(dealt)
    return _waited(costs, dealt) / mean if mean else 1.0


def imbalance(costs: Sequence[float], ranks: Sequence[int], *, num_ranks: int) -> float:
    """The most work of a rank, over the mean, whatever its micro-batches."""
    work = np.bincount(ranks, weights=costs, minlength=num_ranks)
    return float(work.max() / work.mean()) if work.any() else 1.0


def _waited(costs: Sequence[float], dealt: Dealt) -> float:
    """The sum over micro-steps of the most costly micro-batch."""
    work = [[sum(costs[i] for i in rows) for rows in batches] for batches in dealt]
    steps = max(map(len, work), default=0)
    return sum(max(rank[s] for rank in work if s < len(rank)) for s in range(steps))


def _neighbours(
    costs: Sequence[float], batches: Sequence[Sequence[int]], *, num_ranks: int
) -> Dealt:
    """Full micro-batches, those that cost about the same in one micro-step."""
    ordered = sorted(batches, key=lambda rows: -sum(costs[i] for i in rows))
    return [[list(rows) for rows in ordered[rank::num_ranks]] for rank in range(num_ranks)]


def _even(
    costs: Sequence[float],
    lengths: Sequence[int],
    home: Sequence[int],
    *,
    budget: int,
    ranks: int,
    steps: int,
) -> Dealt | None:
    """Costly rows first, each to the micro-batch with the least work; None if they do not fit.

    A row stays at home while a micro-batch there is within the mean, so that few rows travel.
    """
    work, room = np.zeros((ranks, steps)), np.full((ranks, steps), budget)
    chosen: Dealt = [[[] for _ in range(steps)] for _ in range(ranks)]
    mean = sum(costs) / (ranks * steps)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        has_room = room >= min(lengths[i], budget)
        if not has_room.any():
            return None
        open_work = np.where(has_room, work, np.inf)
        rank, step = home[i], int(open_work[home[i]].argmin())
        if open_work[rank, step] + costs[i] > mean:
            rank, step = divmod(int(open_work.argmin()), steps)
        work[rank, step] += costs[i]
        room[rank, step] = max(0, room[rank, step] - lengths[i])
        chosen[rank][step].append(i)
    order = np.argsort(-work, axis=1, kind="stable")
    return [
        [batches[step] for step in steps_of if batches[step]]
        for batches, steps_of in zip(chosen, order.tolist(), strict=True)
    ]
