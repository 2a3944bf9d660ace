"""Even work for the ranks: rows move from ranks with more of it to ranks with less.

Each rank samples whole groups, so what it holds is uneven: trajectories differ in length,
in pictures, and some ranks may hold none. Before a step every rank tells the cost of its
rows, all compute the same assignment, and rows that are not at home travel once. Sums over
a step do not depend on who computes which summand.

Pictures travel encoded, and only to a rank that does not have them.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from tapo_train.algos.metrics import Metrics, pair
from tapo_train.learner import distributed
from tapo_train.learner.batch import TrainingRow
from tapo_train.learner.sequence import SequenceGroup
from tapo_train.learner.shape import ModelShape
from tapo_train.types import Image


class RowExchange(Protocol):
    """Decides which rank trains which rows."""

    def __call__(self, rows: Sequence[TrainingRow]) -> tuple[list[TrainingRow], Metrics]:
        """The rows this rank trains, out of those that all ranks bring. All ranks call it."""
        ...


def keep(rows: Sequence[TrainingRow]) -> tuple[list[TrainingRow], Metrics]:
    """Every rank trains the rows it brings."""
    return list(rows), {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """The ranks of a sequence group train the rows of all of them, in the same order."""

    inner: RowExchange
    """Deals the rows to ranks first."""
    sequence: SequenceGroup

    def __call__(self, rows: Sequence[TrainingRow]) -> tuple[list[TrainingRow], Metrics]:
        """The rows of this rank's group.

        Pictures travel even where they are known: in a step of the demo over two ranks 1 % of the
        bytes, as the ranks ask different questions.
        """
        mine, metrics = self.inner(rows)
        return [row for part in self.sequence.objects(mine) for row in part], metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCost:
    """FLOP of a row's update: linear layers, attention, head at trained tokens, pictures."""

    shape: ModelShape
    image_token_id: int

    def __call__(self, row: TrainingRow) -> float:
        """A picture counts each time it is shown: where rows share it is not known yet."""
        per_token = self.shape.vision.merge_size**2
        return self.shape.update_flop(
            tokens=len(row.tokens),
            trained=row.num_trained,
            patches=[run * per_token for run in self._runs(row)],
        )

    def _runs(self, row: TrainingRow) -> list[int]:
        """Tokens of each picture, in order."""
        edges = np.diff(np.pad((row.tokens == self.image_token_id).astype(np.int8), 1))
        lengths: list[int] = (np.flatnonzero(edges < 0) - np.flatnonzero(edges > 0)).tolist()
        return lengths


def assign(
    costs: Sequence[float], *, num_ranks: int, home: Sequence[int] | None = None
) -> list[int]:
    """The rank of each row: costly rows first, each to the rank with the least work.

    A row stays at home while its rank is within the mean, so that few rows travel. No rank
    exceeds the mean by more than the cost of one row (longest processing time first).

    Args:
        costs: of all rows of the step, >= 0, the same on every rank.
        home: where each row is now; None if they are nowhere yet.
    """
    capacity = sum(costs) / num_ranks
    work = [0.0] * num_ranks
    chosen = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        stays = home is not None and work[home[i]] + costs[i] <= capacity
        rank = home[i] if home is not None and stays else work.index(min(work))
        chosen[i] = rank
        work[rank] += costs[i]
    return chosen


def same_place(home: Sequence[int], groups: Sequence[int], *, ranks_per_group: int) -> list[int]:
    """The rank of each row in the group chosen for it: at home there, home itself."""
    return [
        group * ranks_per_group + rank % ranks_per_group
        for rank, group in zip(home, groups, strict=True)
    ]


def imbalance(costs: Sequence[float], ranks: Sequence[int], *, num_ranks: int) -> float:
    """The most work of a rank, over the mean: 1 is even, the time of a step grows with it."""
    work = np.bincount(ranks, weights=costs, minlength=num_ranks)
    return float(work.max() / work.mean()) if work.any() else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Balanced:
    """Moves rows until the ranks' costs are even.

    With groups of ranks it is the groups' costs: which rank of its group has a row does not
    matter then.
    """

    cost: RowCost
    ranks_per_group: int = 1

    def __call__(self, rows: Sequence[TrainingRow]) -> tuple[list[TrainingRow], Metrics]:
        """This rank's share: its own rows that stay, then guests by the rank that brought them."""
        num_ranks, own = distributed.world_size(), distributed.rank()
        if num_ranks == 1:
            return keep(rows)
        brought = distributed.all_gather_objects([_describe(row, self.cost(row)) for row in rows])
        home = [rank for rank, entries in enumerate(brought) for _ in entries]
        costs = [cost for entries in brought for cost, _ in entries]
        size = self.ranks_per_group
        homes = [rank // size for rank in home]
        groups = assign(costs, num_ranks=num_ranks // size, home=homes)
        chosen = same_place(home, groups, ranks_per_group=size)
        parcels = pack_parcels(rows, brought, chosen, rank=own)
        arrived = [
            pickle.loads(data)  # from a process of this very run
            for data in distributed.exchange_bytes([pickle.dumps(parcel) for parcel in parcels])
        ]
        start = sum(len(entries) for entries in brought[:own])
        stays = [to == own for to in chosen[start : start + len(rows)]]
        mine = _unpack(rows, stays, arrived)
        before = imbalance(costs, homes, num_ranks=num_ranks // size)
        after = imbalance(costs, groups, num_ranks=num_ranks // size)
        return mine, {
            "balance/sampled": pair(torch.tensor(before, dtype=torch.float64)),
            "balance/trained": pair(torch.tensor(after, dtype=torch.float64)),
        }


Description = tuple[float, tuple[str, ...]]
"""Cost and digests of the pictures of a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """What one rank sends another."""

    rows: tuple[TrainingRow, ...]
    """Without their pictures."""
    shown: tuple[tuple[str, ...], ...]
    """Digests of the pictures of each row."""
    pictures: tuple[Image, ...]
    """Those the receiver does not have."""


def _describe(row: TrainingRow, cost: float) -> Description:
    return cost, tuple(image.sha256 for image in row.images)


def pack_parcels(
    rows: Sequence[TrainingRow],
    brought: Sequence[Sequence[Description]],
    chosen: Sequence[int],
    *,
    rank: int,
) -> list[Parcel]:
    """What `rank`, which brought `rows`, sends to each rank.

    Every rank plans the journeys of all, so that no picture reaches a rank twice.

    Args:
        brought: of each rank's rows; `chosen`: where those of all ranks go, in that order.
    """
    held = [{d for _, digests in entries for d in digests} for entries in brought]
    leaving: list[list[TrainingRow]] = [[] for _ in brought]
    carried: list[dict[str, Image]] = [{} for _ in brought]
    target_of = iter(chosen)
    for source, entries in enumerate(brought):
        for number, (_, digests) in enumerate(entries):
            target = next(target_of)
            missing = set(digests) - held[target]
            held[target] |= missing
            if source == rank != target:
                row = rows[number]
                leaving[target].append(row)
                carried[target] |= {i.sha256: i for i in row.images if i.sha256 in missing}
    return [
        Parcel(
            rows=tuple(replace(row, images=()) for row in going),
            shown=tuple(tuple(image.sha256 for image in row.images) for row in going),
            pictures=tuple(pictures.values()),
        )
        for going, pictures in zip(leaving, carried, strict=True)
    ]


def _unpack(
    rows: Sequence[TrainingRow], stays: Sequence[bool], arrived: Sequence[Parcel]
) -> list[TrainingRow]:
    """The rows that stay and those that arrived, these with their pictures again."""
    known = {image.sha256: image for row in rows for image in row.images}
    known |= {image.sha256: image for parcel in arrived for image in parcel.pictures}
    guests = [
        replace(row, images=tuple(known[digest] for digest in digests))
        for parcel in arrived
        for row, digests in zip(parcel.rows, parcel.shown, strict=True)
    ]
    return [*(row for row, at_home in zip(rows, stays, strict=True) if at_home), *guests]
