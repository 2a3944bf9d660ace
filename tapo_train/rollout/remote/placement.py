"""Which server a request goes to: the one that has its prefix, unless it is overloaded."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

from tapo_train.rollout.engine import GenerationRequest
from tapo_train.rollout.remote.link import ServerLink

SLACK_REQUESTS = 4
SLACK_RATIO = 1.25
"""A server keeps its trajectories while it has at most SLACK_RATIO times as many requests
as the least loaded one, and SLACK_REQUESTS more."""


class Placement:
    """Remembers where prefixes are cached."""

    def __init__(self) -> None:
        self._homes: dict[str | bytes, ServerLink] = {}

    def choose(self, links: Sequence[ServerLink], request: GenerationRequest) -> ServerLink:
        """A server among `links`, of which there is at least one.

        The turns of a trajectory stay together, and so do the attempts of a group, which
        begin with the same tokens.
        """
        least = min(links, key=lambda link: link.load)
        most = SLACK_RATIO * least.load + SLACK_REQUESTS
        keys = (request.id.rpartition(":")[0], sha256(request.tokens.tobytes()).digest())
        homes = [self._homes[key] for key in keys if key in self._homes]
        chosen = next((link for link in homes if link in links and link.load <= most), least)
        self._homes.update(dict.fromkeys(keys, chosen))
        return chosen

    def forget(self) -> None:
        """The caches are empty: new weights."""
        self._homes.clear()
