"""The order in which training visits the tasks: deterministic, resumable, the same on every rank.

Each epoch is a fresh permutation that depends on (seed, epoch) and the tasks' ids alone: a task
that is added, mended or taken out between two parts of a run leaves the order of the others as
it was. A batch may reach over the end of an epoch but never holds a task twice, because two
groups of one question would share a group id and bias the step towards it: a task of the new
epoch that is already in the batch waits for the next one.

A task of weight w takes part in an epoch with chance w, drawn from the same three things.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from tapo_train.errors import DataError
from tapo_train.types import JsonObject

__all__ = ["TaskSampler", "shard"]

T = TypeVar("T")


class TaskSampler:
    """Hands out task indices for ever.

    Args:
        ids: of the tasks, all different; an index is a position among them.
        shuffle: False visits them in the order given.
        weights: of the tasks, in (0, 1]; None: all 1.
        ease: of the tasks; the first epoch goes from the easiest to the hardest. None: it is
            shuffled like the others.
    """

    def __init__(
        self,
        ids: Iterable[str],
        *,
        seed: int,
        shuffle: bool = True,
        weights: Sequence[float] | None = None,
        ease: Sequence[float] | None = None,
    ) -> None:
        self._ids = tuple(ids)
        if not self._ids:
            raise DataError("sampler over 0 tasks; wanted at least one")
        if len(set(self._ids)) < len(self._ids):
            raise DataError("sampler over tasks that share an id; wanted a unique id for each")
        for values in (weights, ease):
            if values is not None and len(values) != len(self._ids):
                raise DataError(f"sampler over {len(self._ids)} tasks; found {len(values)} weights")
        self._seed = seed
        self._shuffle = shuffle
        self._weights = weights
        self._ease = ease
        self._epoch = 0
        self._pending = self._order(0)

    @property
    def num_tasks(self) -> int:
        """How many tasks there are."""
        return len(self._ids)

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
        available = len(self._ids) - len(set(exclude))
        if not 1 <= num <= available:
            raise DataError(
                f"a batch of {num} different tasks was asked of {available}; "
                f"wanted between 1 and {available}"
            )
        batch = self._take(num, exclude=exclude)
        while len(batch) < num:  # with weights an epoch may be shorter than a batch
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
        order = [index for index in range(len(self._ids)) if self._takes_part(epoch, index)]
        if self._shuffle:
            order.sort(key=lambda index: self._rank(epoch, self._ids[index]))
        if self._ease is not None and epoch == 0:
            ease = self._ease
            order.sort(key=lambda index: -ease[index])
        return order

    def _takes_part(self, epoch: int, index: int) -> bool:
        if self._weights is None or self._weights[index] >= 1:
            return True
        drawn = self._rank(epoch, f"weight {self._ids[index]}")
        return int.from_bytes(drawn) < self._weights[index] * 2**128

    def _rank(self, epoch: int, identifier: str) -> bytes:
        text = f"{self._seed} {epoch} {identifier}"
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs; JSON."""
        pending = set(self._pending)
        return {
            "seed": self._seed,
            "shuffle": self._shuffle,
            "epoch": self._epoch,
            "drawn": [id for index, id in enumerate(self._ids) if index not in pending],
        }

    def load_state_dict(self, state: JsonObject) -> None:
        """Go on where `state` was taken, with the tasks there are now.

        Tasks that were not there then come in this epoch, those that are gone are forgotten.

        Raises:
            DataError: it is of another sampler, or of other tasks altogether.
        """
        own = self.state_dict()
        if set(state) != set(own):
            raise DataError(f"sampler state has keys {sorted(state)}; wanted {sorted(own)}")
        for name in ("seed", "shuffle"):
            if state[name] != own[name]:
                raise DataError(
                    f"sampler state: {name} is {state[name]!r} but this run has {own[name]!r}; "
                    "resume with the seed the run was started with"
                )
        self._epoch, self._pending = self._position(state)

    def _position(self, state: Mapping[str, Any]) -> tuple[int, list[int]]:
        epoch, drawn = state["epoch"], state["drawn"]
        if not isinstance(epoch, int) or epoch < 0 or not isinstance(drawn, list):
            raise DataError(f"sampler state: epoch {epoch!r} with drawn {type(drawn).__name__}")
        gone = set(drawn)
        if gone and gone.isdisjoint(self._ids):
            raise DataError(
                f"sampler state: none of the {len(gone)} tasks drawn in epoch {epoch} is among the "
                f"{len(self._ids)} of this run; wanted the data the run was started with, of which "
                "tasks may be mended, added or taken out"
            )
        return epoch, [index for index in self._order(epoch) if self._ids[index] not in gone]


def shard(batch: Sequence[T], rank: int, world_size: int) -> list[T]:
    """This rank's questions of a global batch: every `world_size`-th, starting at `rank`.

    Shards are disjoint, cover the batch and differ in length by at most one.
    """
    if not 0 <= rank < world_size:
        raise DataError(f"rank {rank} of {world_size}; wanted 0 <= rank < world size")
    return list(batch[rank::world_size])
