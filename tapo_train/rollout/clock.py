"""The time of episodes: it stands still while nobody steps their engine."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

__all__ = ["PlayClock"]


class PlayClock:
    """[s] On one event loop.

    Between two stretches of a rollout the learner has the device, which is nobody's lateness.
    """

    def __init__(self) -> None:
        self._scopes: dict[asyncio.Timeout, float] = {}
        """Deadlines that are waited for, on this clock."""
        self._stopped_at: float | None = None
        self._stood_s = 0.0

    def now(self) -> float:
        """The time."""
        here = asyncio.get_running_loop().time() if self._stopped_at is None else self._stopped_at
        return here - self._stood_s

    @asynccontextmanager
    async def until(self, deadline: float) -> AsyncIterator[asyncio.Timeout]:
        """As `asyncio.timeout_at`, with a deadline on this clock; infinity is none."""
        scope = asyncio.timeout_at(self._on_the_loop(deadline))
        self._scopes[scope] = deadline
        try:
            async with scope:
                yield scope
        finally:
            del self._scopes[scope]

    def stop(self) -> None:
        """Nobody is late from now on; stopped already: no effect."""
        if self._stopped_at is None:
            self._stopped_at = asyncio.get_running_loop().time()
            self._reschedule()

    def go_on(self) -> None:
        """Time passes again; it passes already: no effect."""
        if self._stopped_at is not None:
            self._stood_s += asyncio.get_running_loop().time() - self._stopped_at
            self._stopped_at = None
            self._reschedule()

    def _on_the_loop(self, deadline: float) -> float | None:
        is_never = deadline == math.inf or self._stopped_at is not None
        return None if is_never else deadline + self._stood_s

    def _reschedule(self) -> None:
        for scope, deadline in self._scopes.items():
            if not scope.expired():
                scope.reschedule(self._on_the_loop(deadline))
