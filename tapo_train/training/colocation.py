"""Sampler and learner on one device: who holds its memory when.

    rollout            update                 sync
    engine awake       engine asleep          learner's states out, engine awake again
    states outside     learner's states in

Weights of the learner stay where they are: scoring and the sync need them. What moves is
what only an update needs (master weights, optimizer states), and what only a rollout needs
(the engine's weights, keys and values).
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

GIB = 2**30


class DeviceSharing:
    """Calls what makes room for the next phase; without anything to call all stays resident.

    Args:
        before_learning: in this order, as the engine's sleep and the states' way in.
        before_sampling: as the states' way out and the engine's waking.

    Every callable may be called again without effect.
    """

    def __init__(
        self,
        *,
        before_learning: Sequence[Callable[[], None]] = (),
        before_sampling: Sequence[Callable[[], None]] = (),
    ) -> None:
        self._before_learning = tuple(before_learning)
        self._before_sampling = tuple(before_sampling)

    def learning(self) -> None:
        """The learner's turn: no sampling until `sampling`."""
        for move in self._before_learning:
            move()

    def sampling(self) -> None:
        """The sampler's turn, the sync of its weights included: no update until `learning`."""
        for move in self._before_sampling:
            move()


def begin_stage() -> None:
    """Forget the device's peak, so that `stage_memory` speaks of what follows."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def stage_memory() -> dict[str, float]:
    """[GiB] by kind: resident memory now and, with a GPU, torch's peaks since `begin_stage`.

    `cuda_used` is all that is taken of the device now, by any library or process.
    """
    found = {"rss": resident_gib()}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found |= {
            "cuda_allocated": torch.cuda.max_memory_allocated() / GIB,
            "cuda_reserved": torch.cuda.max_memory_reserved() / GIB,
            "cuda_used": (total - free) / GIB,
        }
    return found


def resident_gib() -> float:
    """[GiB] resident memory of this process."""
    statistics = Path("/proc/self/statm")
    if not statistics.exists():  # not Linux: the peak is the nearest there is
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    pages = int(statistics.read_text().split()[1])
    return pages * resource.getpagesize() / GIB
