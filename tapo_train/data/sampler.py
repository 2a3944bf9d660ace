"""The order in which training visits the tasks: deterministic, resumable, the same on every rank.

Each epoch is a fresh permutation that depends on (seed, epoch) alone. A batch may
reach over the end of an epoch but never holds a task twice, because two groups of
one question would share a group id and bias the step towards it: a task of the new
epoch that is already in the batch waits for the next one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from tapo_train.errors import DataError
from tapo_train.types import JsonObject

__all__ = ["TaskSampler", "shard"]

T = TypeVar("T")


class TaskSampler:
    """Hands out task indices for ever."""

    def __init__(self, num_tasks: int, *, seed: int, shuffle: bool = True) -> None:
        if num_tasks < 1:
            raise DataError(f"sampler over {num_tasks} tasks; wanted at least one")
        self._num_tasks = num_tasks
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = 0
        self._pending = self._order(0)

    @property
    def num_tasks(self) -> int:
        """How many tasks there are."""
        return self._num_tasks

    @property
    def epoch(self) -> int:
        """0-based epoch the next index is taken from."""
        return self._epoch if self._pending else self._epoch + 1

    def next_batch(self, num: int, *, exclude: Sequence[int] = ()) -> list[int]:
        """The next `num` different task indices; DataError if there are not that many tasks.

        Args:
            exclude: tasks that must not be among them. They are passed over and stay where
                they are; those that have not come when the epoch ends are left out of it.
        """
        available = self._num_tasks - len(set(exclude))
        if not 1 <= num <= available:
            raise DataError(
                f"a batch of {num} different tasks was asked of {available}; "
                f"wanted between 1 and {available}"
            )
        batch = self._take(num, exclude=exclude)
        if len(batch) < num:
            self._epoch += 1
            self._pending = self._order(self._epoch)
            batch += self._take(num - len(batch), exclude=[*exclude, *batch])
        return batch

    def _take(self, num: int, *, exclude: Sequence[int]) -> list[int]:
        barred = set(exclude)
        taken = [index for index in self._pending if index not in barred][:num]
        gone = set(taken)
        self._pending = [index for index in self._pending if index not in gone]
        return taken

    def _order(self, epoch: int) -> list[int]:
        if not self._shuffle:
            return list(range(self._num_tasks))
        order: list[int] = (
            np.random.default_rng([self._seed, epoch]).permutation(self._num_tasks).tolist()
        )
        return order

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs; JSON."""
        return {
            "num_tasks": self._num_tasks,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "epoch": self._epoch,
            "pending": list(self._pending),
        }

    def load_state_dict(self, state: JsonObject) -> None:
        """Go on where `state` was taken; DataError if it is of another sampler."""
        own = self.state_dict()
        if set(state) != set(own):
            raise DataError(f"sampler state has keys {sorted(state)}; wanted {sorted(own)}")
        for name in ("num_tasks", "seed", "shuffle"):
            if state[name] != own[name]:
                raise DataError(
                    f"sampler state: {name} is {state[name]!r} but this run has {own[name]!r}; "
                    "resume with the data and seed the run was started with"
                )
        self._epoch, self._pending = self._position(state)

    def _position(self, state: Mapping[str, Any]) -> tuple[int, list[int]]:
        epoch, pending = state["epoch"], state["pending"]
        if not isinstance(epoch, int) or epoch < 0 or not isinstance(pending, list):
            raise DataError(f"sampler state: epoch {epoch!r} with pending {type(pending).__name__}")
        remaining = set(pending)
        if [index for index in self._order(epoch) if index in remaining] != pending:
            raise DataError(
                f"sampler state: pending tasks are not in the order of epoch {epoch} of this seed"
            )
        return epoch, list(pending)


def shard(batch: Sequence[T], rank: int, world_size: int) -> list[T]:
    """This rank's questions of a global batch: every `world_size`-th, starting at `rank`.

    Shards are disjoint, cover the batch and differ in length by at most one.
    """
    if not 0 <= rank < world_size:
        raise DataError(f"rank {rank} of {world_size}; wanted 0 <= rank < world size")
    return list(batch[rank::world_size])
