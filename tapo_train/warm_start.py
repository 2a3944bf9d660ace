"""The supervised warm start: able first, then imperfect.

Phase one trains on faultless demonstrations, which hold the most to learn per
token; phase two on the demonstrator's real, faulty mixture, which sets the habits
reinforcement learning starts from. Same learner, same collation, same tokens as
in training.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tapo_train.algos.metrics import finalise
from tapo_train.data.sampler import shard
from tapo_train.demonstrate import Demonstrator, load_world_tasks
from tapo_train.learner import distributed
from tapo_train.learner.batch import TrainingRow, pack
from tapo_train.learner.objective import supervised
from tapo_train.learner.policy import Policy
from tapo_train.rollout.chat import ChatFormat
from tapo_train.tools.base import Toolbox
from tapo_train.world.build import WorldSize, write_world
from tapo_train.world.demonstrations import FAULTLESS, Faults

_FEW_HELD_OUT = 8
"""Questions the unused splits of a demonstration world get."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmStart:
    """How many updates on which demonstrations."""

    able_updates: int
    """Updates on faultless demonstrations, first."""
    habit_updates: int
    """Updates on faulty ones, afterwards."""
    trajectories_per_update: int
    """Over all ranks."""
    micro_batch_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a warm start stands after an update."""

    update: int
    total: int
    nll: float
    """[nat] per trained token of the update's batch, before it."""
    tokens_per_s: float
    """Over all ranks."""
    seconds: float
    """Wall time of the update."""


def warm_start(
    policy: Policy,
    *,
    able: Sequence[TrainingRow],
    habit: Sequence[TrainingRow],
    settings: WarmStart,
    seed: int,
    report: Callable[[Progress], None],
) -> None:
    """Run both phases; every rank calls it with the same rows and takes its share."""
    total = settings.able_updates + settings.habit_updates
    batches = _batches(able, settings.able_updates, settings.trajectories_per_update, seed)
    habits = _batches(habit, settings.habit_updates, settings.trajectories_per_update, seed + 1)
    for update, batch in enumerate([*batches, *habits]):
        started = time.perf_counter()
        mine = shard(batch, distributed.rank(), distributed.world_size())
        micro_batches = pack(mine, budget_tokens=settings.micro_batch_tokens)
        metrics = finalise(policy.update(micro_batches, supervised))
        seconds = time.perf_counter() - started
        report(
            Progress(
                update=update + 1,
                total=total,
                nll=metrics["supervised/nll"],
                tokens_per_s=sum(len(row.tokens) for row in batch) / seconds,
                seconds=seconds,
            )
        )


def record_world(
    folder: Path,
    *,
    seed: int,
    questions: int,
    chat: ChatFormat,
    toolbox: Callable[[Path], Toolbox],
    system_prompt: str,
) -> tuple[list[TrainingRow], list[TrainingRow]]:
    """Write the world of `seed` and demonstrate all its questions: (faultless, faulty) rows.

    Args:
        toolbox: a world's folder to the tools over its corpus and image index.
    """
    size = WorldSize(
        train_houses=480,
        validation_houses=_FEW_HELD_OUT,
        test_houses=_FEW_HELD_OUT,
        train_questions=questions,
        validation_questions=1,
        test_questions=1,
    )
    write_world(folder, seed, size)
    tasks, tools = load_world_tasks(folder, "train"), toolbox(folder)
    recorded = []
    for faults in (FAULTLESS, Faults()):
        demonstrator = Demonstrator(chat, tools, system_prompt=system_prompt, faults=faults)
        recorded.append([found.row for found in demonstrator.record(tasks, seed=seed)])
    return recorded[0], recorded[1]


def _batches(
    rows: Sequence[TrainingRow], count: int, size: int, seed: int
) -> Iterator[list[TrainingRow]]:
    """`count` batches; every row is used once before any is used again."""
    rng = random.Random(seed)
    order: list[int] = []
    for _ in range(count):
        while len(order) < size:
            fresh = list(range(len(rows)))
            rng.shuffle(fresh)
            order = fresh + order
        yield [rows[order.pop()] for _ in range(size)]
