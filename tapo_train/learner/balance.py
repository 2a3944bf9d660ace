"""Even work for the ranks: rows move from ranks with more of it to ranks with less.

Each rank samples whole groups, so what it holds is uneven: trajectories differ in length,
in pictures, and some ranks may hold none. Before a step every rank tells the cost of its
rows, all compute the same micro-batches (`dealing`), and rows that are not at home travel once.
Sums over a step do not depend on who computes which summand.

Pictures travel encoded, and only to a rank that does not have them.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Protocol

import numpy as np
import torch

from tapo_train.algos.metrics import Metrics, pair
from tapo_train.learner import distributed
from tapo_train.learner.batch import TrainingRow, pack_numbers
from tapo_train.learner.dealing import deal_together, evenness, imbalance, rank_of
from tapo_train.learner.sequence import ALONE, SequenceGroup
from tapo_train.learner.shape import ModelShape
from tapo_train.types import Image

MicroBatches = list[list[TrainingRow]]
"""The rows of each of a rank's micro-batches."""


class RowExchange(Protocol):
    """Decides which rank trains which rows, and which of them together."""

    def __call__(self, rows: Sequence[TrainingRow]) -> tuple[MicroBatches, Metrics]:
        """This rank's micro-batches, out of the rows that all ranks bring. All ranks call it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Every rank trains the rows it brings; those of a sequence group the rows of all of them."""

    budget_tokens: int
    """Of a micro-batch; a longer row goes alone."""
    sequence: SequenceGroup = ALONE
    whole_groups: bool = False
    """Whether the rows of a question stay together."""

    def __call__(self, rows: Sequence[TrainingRow]) -> tuple[MicroBatches, Metrics]:
        """See `RowExchange`."""
        held = [row for part in self.sequence.objects(list(rows)) for row in part]
        chosen = pack_numbers(
            held, budget_tokens=self.budget_tokens, whole_groups=self.whole_groups
        )
        return [[held[i] for i in numbers] for numbers in chosen], {}


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


def same_place(home: Sequence[int], groups: Sequence[int], *, ranks_per_group: int) -> list[int]:
    """The rank of each row in the group chosen for it: at home there, home itself."""
    return [
        group * ranks_per_group + rank % ranks_per_group
        for rank, group in zip(home, groups, strict=True)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Balanced:
    """Moves rows until the costs of the ranks' micro-batches are even, one by one.

    Ranks meet after each micro-batch, so it is the most costly of each that all wait for. With
    groups of ranks it is the groups' costs, and each rank gets all rows of its group. Pictures
    then travel even where they are known: in a step of the demo over two ranks 1 % of the bytes.
    """

    cost: RowCost
    budget_tokens: int
    """Of a micro-batch; a longer row goes alone."""
    sequence: SequenceGroup = ALONE
    whole_groups: bool = False
    """Whether the rows of a question stay together, as a loss over groups wants it."""

    def __call__(self, rows: Sequence[TrainingRow]) -> tuple[MicroBatches, Metrics]:
        """See `RowExchange`."""
        num_ranks, own, size = distributed.world_size(), distributed.rank(), self.sequence.size
        if num_ranks == 1:
            kept = Kept(budget_tokens=self.budget_tokens, whole_groups=self.whole_groups)
            return kept(rows)
        own_rows = [_describe(row, self.cost(row), bound=self.whole_groups) for row in rows]
        brought = distributed.all_gather_objects(own_rows)
        home = [rank for rank, entries in enumerate(brought) for _ in entries]
        costs = [entry.cost for entries in brought for entry in entries]
        homes = [rank // size for rank in home]
        dealt = deal_together(
            [entry.group for entries in brought for entry in entries],
            costs,
            [entry.tokens for entries in brought for entry in entries],
            budget_tokens=self.budget_tokens,
            num_ranks=num_ranks // size,
            home=homes,
        )
        groups = rank_of(dealt, count=len(costs))
        chosen = same_place(home, groups, ranks_per_group=size)
        held: dict[int, TrainingRow] = {}
        for part in self.sequence.objects(_travel(rows, brought, chosen, rank=own)):
            held |= part
        before = imbalance(costs, homes, num_ranks=num_ranks // size)
        return [[held[i] for i in numbers] for numbers in dealt[own // size]], {
            "balance/sampled": pair(torch.tensor(before, dtype=torch.float64)),
            "balance/trained": pair(torch.tensor(evenness(costs, dealt), dtype=torch.float64)),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What all ranks know of a row."""

    cost: float
    """[FLOP]"""
    tokens: int
    pictures: tuple[str, ...]
    """Their digests."""
    group: str = ""
    """Rows of one name go together; "" binds none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """What one rank sends another."""

    rows: tuple[TrainingRow, ...]
    """Without their pictures."""
    shown: tuple[tuple[str, ...], ...]
    """Digests of the pictures of each row."""
    pictures: tuple[Image, ...]
    """Those the receiver does not have."""


def _describe(row: TrainingRow, cost: float, *, bound: bool) -> Description:
    return Description(
        cost=cost,
        tokens=len(row.tokens),
        pictures=tuple(image.sha256 for image in row.images),
        group=row.group if bound else "",
    )


def _travel(
    rows: Sequence[TrainingRow],
    brought: Sequence[Sequence[Description]],
    chosen: Sequence[int],
    *,
    rank: int,
) -> dict[int, TrainingRow]:
    """The rows that `rank` trains, by their number among those of all ranks. All ranks call it."""
    parcels = pack_parcels(rows, brought, chosen, rank=rank)
    arrived = [
        pickle.loads(data)  # from a process of this very run
        for data in distributed.exchange_bytes([pickle.dumps(parcel) for parcel in parcels])
    ]
    starts = [0, *accumulate(map(len, brought))]
    coming = [
        [i for i in range(first, end) if chosen[i] == rank] for first, end in pairwise(starts)
    ]
    stays = {i: rows[i - starts[rank]] for i in coming[rank]}
    numbers = [i for source, ids in enumerate(coming) if source != rank for i in ids]
    return stays | dict(zip(numbers, _unpack(rows, arrived), strict=True))


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
    held = [{d for entry in entries for d in entry.pictures} for entries in brought]
    leaving: list[list[TrainingRow]] = [[] for _ in brought]
    carried: list[dict[str, Image]] = [{} for _ in brought]
    target_of = iter(chosen)
    for source, entries in enumerate(brought):
        for number, entry in enumerate(entries):
            target = next(target_of)
            missing = set(entry.pictures) - held[target]
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


def _unpack(rows: Sequence[TrainingRow], arrived: Sequence[Parcel]) -> list[TrainingRow]:
    """The rows that arrived, with their pictures again; `rows` are those brought."""
    known = {image.sha256: image for row in rows for image in row.images}
    known |= {image.sha256: image for parcel in arrived for image in parcel.pictures}
    return [
        replace(row, images=tuple(known[digest] for digest in digests))
        for parcel in arrived
        for row, digests in zip(parcel.rows, parcel.shown, strict=True)
    ]
