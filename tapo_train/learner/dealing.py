"""Which rank trains which rows in which micro-batch, so that no micro-step waits long.

Sharded gradients (and weights) bring the ranks together after every micro-batch. What counts is
therefore not how even the ranks' sums are, but the most costly micro-batch of each micro-step.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np

from tapo_train.learner.packing import best_fit, together

Dealt = list[list[list[int]]]
"""By rank, then by micro-step: the numbers of the rows of a micro-batch."""

SPARE_STEPS = 1
"""Micro-steps above the fewest possible that are tried: room makes costs even."""

STEP_COST = 0.02
"""Of a micro-batch's cost, what a micro-step more takes: weights are gathered again. Assumed."""


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
        home: where each row is now; of equal cuts, few rows travel.
    """
    full = best_fit(lengths, budget_tokens=budget_tokens)
    fewest = ceil(len(full) / num_ranks)
    cuts = [full]
    for steps in range(fewest, fewest + 1 + SPARE_STEPS) if full else ():
        even = _even(costs, lengths, budget=budget_tokens, count=steps * num_ranks)
        cuts += [even] if even else []
    dealt = [_neighbours(costs, cut, home, num_ranks=num_ranks) for cut in cuts]
    step = STEP_COST * sum(costs) / num_ranks / max(fewest, 1)
    return min(dealt, key=lambda each: _waited(costs, each) + step * max(map(len, each)))


def deal_together(
    names: Sequence[str],
    costs: Sequence[float],
    lengths: Sequence[int],
    *,
    budget_tokens: int,
    num_ranks: int,
    home: Sequence[int],
) -> Dealt:
    """As `deal`, with rows of one name in one micro-batch; "" is no name.

    Rows of one name that are longer together than the budget go alone, as one long row does.
    """
    units = together(names)
    dealt = deal(
        [sum(costs[i] for i in unit) for unit in units],
        [sum(lengths[i] for i in unit) for unit in units],
        budget_tokens=budget_tokens,
        num_ranks=num_ranks,
        home=[home[unit[0]] for unit in units],
    )
    return [[[i for u in batch for i in units[u]] for batch in batches] for batches in dealt]


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
    costs: Sequence[float], batches: Sequence[list[int]], home: Sequence[int], *, num_ranks: int
) -> Dealt:
    """Micro-batches that cost about the same in one micro-step, each where most of it is."""
    dealt: Dealt = [[] for _ in range(num_ranks)]
    ordered = sorted(batches, key=lambda rows: -sum(costs[i] for i in rows))
    for start in range(0, len(ordered), num_ranks):
        together = ordered[start : start + num_ranks]
        there = [np.bincount([home[i] for i in rows], minlength=num_ranks) for rows in together]
        pairs = [(number, rank) for number in range(len(together)) for rank in range(num_ranks)]
        placed, taken = set[int](), set[int]()
        for number, rank in sorted(pairs, key=lambda pair: -there[pair[0]][pair[1]]):
            if number not in placed and rank not in taken:
                placed.add(number)
                taken.add(rank)
                dealt[rank].append(together[number])
    return dealt


def _even(
    costs: Sequence[float], lengths: Sequence[int], *, budget: int, count: int
) -> list[list[int]] | None:
    """Costly rows first, each to the micro-batch with the least work; None if they do not fit."""
    work, room = np.zeros(count), np.full(count, budget)
    chosen: list[list[int]] = [[] for _ in range(count)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        has_room = room >= min(lengths[i], budget)
        if not has_room.any():
            return None
        batch = int(np.where(has_room, work, np.inf).argmin())
        work[batch] += costs[i]
        room[batch] = max(0, room[batch] - lengths[i])
        chosen[batch].append(i)
    return [rows for rows in chosen if rows]
