"""Which engine a request goes to: the one that has its prefix, unless it is overloaded."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

from tapo_train.rollout.engine import GenerationRequest
from tapo_train.rollout.servers.server import Seat

SLACK_REQUESTS = 4
SLACK_RATIO = 1.25
"""An engine keeps its trajectories while it has at most SLACK_RATIO times as many requests
as the least loaded one, and SLACK_REQUESTS more."""


class Placement:
    """Remembers where prefixes are cached."""

    def __init__(self) -> None:
        self._homes: dict[str | bytes, Seat] = {}

    def choose(self, seats: Sequence[Seat], request: GenerationRequest) -> Seat:
        """An engine among `seats`, of which there is at least one.

        The turns of a trajectory stay together, and so do the attempts of a group, which
        begin with the same tokens.
        """
        least = min(seats, key=lambda seat: seat.load)
        most = SLACK_RATIO * least.load + SLACK_REQUESTS
        keys = (request.id.rpartition(":")[0], sha256(request.tokens.tobytes()).digest())
        homes = [self._homes[key] for key in keys if key in self._homes]
        chosen = next((seat for seat in homes if seat in seats and seat.load <= most), least)
        self._homes.update(dict.fromkeys(keys, chosen))
        return chosen

    def forget(self) -> None:
        """The caches are empty: new weights."""
        self._homes.clear()


def servers_of_rank(urls: Sequence[str], rank: int, world_size: int) -> tuple[list[str], bool]:
    """The servers a rank asks, and whether it sends them the weights.

    With as many servers as ranks, each rank has its own; with fewer, ranks share them and
    the lowest rank of each sends for all.
    """
    if len(urls) >= world_size:
        return list(urls[rank::world_size]), True
    return [urls[rank % len(urls)]], rank < len(urls)
