"""How many trajectories may be under way: what memory holds of those seen before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scripted_engine import ScriptedEngine

from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.seats import Seats
from tapo_train.types import Group, StopReason, Task, Trajectory

TASK = Task(id="q", question="Who?", images=(), answers=("Eve",))


class HoldingEngine(ScriptedEngine):
    """Holds `capacity` tokens."""

    capacity: int | None = None

    def capacity_tokens(self) -> int | None:
        return self.capacity


def played(*lengths: int) -> list[Group]:
    """Groups of one trajectory each, of the given numbers of tokens."""
    empty = Trajectory(
        id="t",
        task=TASK,
        tokens=np.zeros(0, dtype=np.int32),
        logprobs=np.zeros(0, dtype=np.float32),
        turns=(),
        images=(),
        answer=None,
        stop=StopReason.ANSWER,
    )
    made = [replace(empty, tokens=np.zeros(length, dtype=np.int32)) for length in lengths]
    return [Group(task=TASK, trajectories=(trajectory,)) for trajectory in made]


@pytest.mark.parametrize(
    ("capacity", "seats"),
    # 2 to 3 of 32768 tokens, as the paper's setting promised, are 14 of 8000 and 32 at least.
    [(112_000, 32), (400_000, 50), (399_999, 49), (10_000_000, 256), (100, 32), (None, 256)],
)
def test_as_many_trajectories_are_under_way_as_fit_at_the_length_seen_before(
    tiny_qwen3_vl: Path, capacity: int | None, seats: int
) -> None:
    engine = HoldingEngine(ChatFormat(tiny_qwen3_vl), lambda _: "")
    engine.capacity = capacity
    found = Seats(engine=engine)
    assert found.free() == 256  # nothing was seen yet
    found.observe(played(6000, 10_000))
    found.observe([])
    assert found.free() == seats


def test_only_the_last_four_rollouts_count(tiny_qwen3_vl: Path) -> None:
    engine = HoldingEngine(ChatFormat(tiny_qwen3_vl), lambda _: "")
    engine.capacity = 100_000
    seats = Seats(engine=engine)
    for length in (9000, 1000, 1000, 1000, 1000):
        seats.observe(played(length))
    assert seats.free() == 100
