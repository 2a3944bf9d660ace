"""The supervised warm start: copy, then able, then imperfect.

1. Copying drills: lists of invented names, said again in another order. Copying an
   unseen name from the context is the one skill that demonstrations alone do not
   teach a policy of this size in reasonable time. The lists grow from one name to
   several, in stages: a mixture of lengths from the start does not get off the ground.
2. Faultless demonstrations, which hold the most to learn per token; what the tools
   answered is learned too, with a smaller weight, as more of the same copying.
3. The demonstrator's real, faulty mixture, which sets the habits that reinforcement
   learning starts from.

Same learner, same collation, same tokens as in training.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from tapo_train.data.sampler import shard
from tapo_train.data.tasks import load_tasks
from tapo_train.demo.demonstrate import Demonstrator
from tapo_train.demo.world.build import WorldSize, write_world
from tapo_train.demo.world.chains import Chains
from tapo_train.demo.world.demonstrations import FAILS_LATE, FAULTLESS, GUESSES, Faults
from tapo_train.demo.world.lexicon import draw_name
from tapo_train.learner.batch import TrainingRow, pack
from tapo_train.learner.objective import supervised
from tapo_train.learner.policy import Policy
from tapo_train.rollout.chat import ChatFormat
from tapo_train.tools.toolbox import Toolbox
from tapo_train.training.step_metrics import means_over_ranks
from tapo_train.types import Span

DRILLS_PER_UPDATE = 64
"""Over all ranks; they are short."""
OBSERVATION_WEIGHT = 0.2
"""Of a token a tool answered, in faultless demonstrations."""
_FEW_HELD_OUT = 8
"""Questions the unused splits of a demonstration world get."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldKind:
    """What is demonstrated in."""

    chains: Chains | None
    syllables: int
    """Of the names in copying drills."""
    houses: int
    """Of the train split."""
    habit: Faults


WORLD_KINDS = {
    "houses": WorldKind(chains=None, syllables=3, houses=480, habit=Faults()),
    "chains": WorldKind(
        chains=Chains(text_only=True, syllables=1, late_failure=0.15),
        syllables=1,
        houses=48,
        habit=FAILS_LATE,
    ),
    "lookups": WorldKind(
        chains=Chains(text_only=True, hops=(1, 1)),
        syllables=2,
        houses=48,
        habit=GUESSES,
    ),
}
"""By `sft.world` of a recipe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmStart:
    """How many updates on what."""

    drills: tuple[tuple[int, int], ...]
    """Stages of (names in a list, updates)."""

    able_updates: int
    """Updates on faultless demonstrations, first."""
    habit_updates: int
    """Updates on faulty ones, afterwards."""
    trajectories_per_update: int
    """Over all ranks."""
    micro_batch_tokens: int

    @property
    def updates(self) -> int:
        """Of all phases."""
        drills = sum(updates for _, updates in self.drills)
        return drills + self.able_updates + self.habit_updates


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
    drill: Callable[[int, random.Random], TrainingRow],
    able: Sequence[TrainingRow],
    habit: Sequence[TrainingRow],
    settings: WarmStart,
    seed: int,
    report: Callable[[Progress], None],
) -> None:
    """Run all phases; every rank calls it with the same rows and takes its share.

    Args:
        drill: makes one drill with that many names.
    """
    size = settings.trajectories_per_update
    batches = chain(
        _drills(drill, settings, seed),
        _batches(able, settings.able_updates, size, seed),
        _batches(habit, settings.habit_updates, size, seed + 1),
    )
    for update, batch in enumerate(batches):
        started = time.perf_counter()
        mine = shard(batch, policy.sequence.number, policy.sequence.count)
        micro_batches = pack(mine, budget_tokens=settings.micro_batch_tokens)
        metrics = means_over_ranks(policy.update(micro_batches, supervised))
        seconds = time.perf_counter() - started
        report(
            Progress(
                update=update + 1,
                total=settings.updates,
                nll=metrics["supervised/nll"],
                tokens_per_s=sum(len(row.tokens) for row in batch) / seconds,
                seconds=seconds,
            )
        )


def copying_drill(
    chat: ChatFormat, num_names: int, rng: random.Random, *, syllables: int
) -> TrainingRow:
    """`num_names` invented names, then the same in another order; the second list is learned."""
    names = [draw_name(rng, num_syllables=syllables) for _ in range(num_names)]
    again = rng.sample(names, num_names)
    first, second = chat.plain(" ".join(names) + "."), chat.plain(f" {' '.join(again)}.")
    return TrainingRow.supervised(
        id=" ".join(names),
        tokens=np.concatenate([first, second]),
        images=(),
        spans=(Span(start=len(first), end=len(first) + len(second)),),
    )


def _drills(
    drill: Callable[[int, random.Random], TrainingRow], settings: WarmStart, seed: int
) -> Iterator[list[TrainingRow]]:
    rng = random.Random(f"drills/{seed}")
    for num_names, updates in settings.drills:
        for _ in range(updates):
            yield [drill(num_names, rng) for _ in range(DRILLS_PER_UPDATE)]


def record_world(
    folder: Path,
    *,
    seed: int,
    questions: int,
    chat: ChatFormat,
    toolbox: Callable[[Path], Toolbox],
    system_prompt: str,
    kind: WorldKind,
) -> tuple[list[TrainingRow], list[TrainingRow]]:
    """Write the world of `seed` and demonstrate all its questions: (faultless, faulty) rows.

    Args:
        toolbox: a world's folder to the tools over its corpus and image index.
        kind: of the world and of its faults.
    """
    size = WorldSize(
        train_houses=kind.houses,
        validation_houses=_FEW_HELD_OUT,
        test_houses=_FEW_HELD_OUT,
        train_questions=questions,
        validation_questions=1,
        test_questions=1,
    )
    write_world(folder, seed, size, chains=kind.chains)
    tasks = load_tasks(folder / "train.jsonl")
    recorded = []
    with closing(toolbox(folder)) as tools:
        for faults, weight in ((FAULTLESS, OBSERVATION_WEIGHT), (kind.habit, 0.0)):
            demonstrator = Demonstrator(
                chat, tools, system_prompt=system_prompt, faults=faults, observation_weight=weight
            )
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
