"""Attempts that the step's deadline interrupts and that go on in the next step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tapo_train.rollout.agent import Episode
from tapo_train.types import Trajectory

__all__ = ["Attempt", "CarryOver"]

Attempt = Episode | Trajectory
"""Interrupted, or over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CarryOver:
    """Whole groups that wait, by the id of their task; in memory, between calls of `collect`."""

    most: int
    """Times an attempt may go on; then its next interruption cuts it for good."""
    _groups: dict[str, list[Attempt]] = field(default_factory=dict)

    def take(self, task: str) -> list[Attempt]:
        """The attempts of a group that waits, in the order they were started; [] if none does."""
        return self._groups.pop(task, [])

    def keep(self, task: str, attempts: Sequence[Attempt]) -> None:
        """Let a group wait."""
        self._groups[task] = list(attempts)
