"""How many trajectories may be under way: what memory holds."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripted_engine import ScriptedEngine

from tapo_train.build.rollout import seats_of
from tapo_train.rollout.chat import ChatFormat


class HoldingEngine(ScriptedEngine):
    """Holds `capacity` tokens."""

    capacity: int | None = None

    def capacity_tokens(self) -> int | None:
        return self.capacity


@pytest.mark.parametrize(
    ("capacity", "seats"),
    [(10_239, 9), (10_240, 10), (1_000_000, 256), (100, 1), (None, 256)],
)
def test_as_many_trajectories_are_under_way_as_fit_at_full_length(
    tiny_qwen3_vl: Path, capacity: int | None, seats: int
) -> None:
    engine = HoldingEngine(ChatFormat(tiny_qwen3_vl), lambda _: "")
    engine.capacity = capacity
    assert seats_of(engine, max_tokens=1024) == seats
