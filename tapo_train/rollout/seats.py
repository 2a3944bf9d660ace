"""How many trajectories are under way at a time on one engine.

Too few leave the engine idle while tools work; with too many, keys and values of trajectories
that wait are thrown out and computed again. An engine queues by itself and shares what is equal,
so the first rollout takes all it may; the later ones what fits at the length seen before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from tapo_train.rollout.engine import Engine
from tapo_train.types import Group

MOST = 256
"""Sequences an engine decodes together."""
LEAST = 32
"""Below it decoding is bound by reading the weights: more sequences cost next to no time."""
ROLLOUTS_REMEMBERED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Seats:
    """Seats of one engine, by what its memory holds of trajectories as they were lately."""

    engine: Engine
    most: int = MOST
    _seen: deque[tuple[int, int]] = field(
        default_factory=lambda: deque[tuple[int, int]](maxlen=ROLLOUTS_REMEMBERED)
    )
    """(tokens, trajectories) of the last rollouts."""

    def free(self) -> int:
        """Trajectories that may be under way in the next rollout, at least 1."""
        capacity = self.engine.capacity_tokens()
        if capacity is None or not self._seen:
            return self.most
        tokens = sum(tokens for tokens, _ in self._seen)
        trajectories = sum(trajectories for _, trajectories in self._seen)
        return min(self.most, max(LEAST, capacity * trajectories // tokens))

    def observe(self, groups: Sequence[Group]) -> None:
        """Remember how long the trajectories of a rollout have become."""
        lengths = [len(t.tokens) for group in groups for t in group.trajectories]
        if lengths:
            self._seen.append((sum(lengths), len(lengths)))
