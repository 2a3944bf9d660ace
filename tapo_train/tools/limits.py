"""How often, how many at a time and how long a tool may be called, and for what price."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiolimiter import AsyncLimiter
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt

from tapo_train.errors import ToolDownError
from tapo_train.types import Observation

__all__ = ["FIRST_PAUSE_S", "LONGEST_PAUSE_S", "Gate", "ToolLimits", "is_retryable"]

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 8.0

_JITTER = random.Random()
"""Its own stream: pauses must not move the random state that a resumed run depends on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolLimits:
    """Limits of one tool in one process."""

    concurrency: int | None = None
    """Most calls at a time; None: as many as trajectories are under way."""
    per_second: float | None = None
    """Attempts per second; a burst of one second's worth is let through. None: no limit."""
    deadline_s: float | None = None
    """[s] for a call, all attempts and pauses included, its queue not; None: the toolbox's."""
    retries: int = 0
    """Further attempts after a failure that may pass."""
    price: float = 0.0
    """Of one attempt, in any unit of money."""


def is_retryable(error: BaseException) -> bool:
    """Whether the same call may succeed a moment later. What the policy did wrong never is."""
    if isinstance(error, ToolDownError):
        return error.retryable
    return isinstance(error, ConnectionError | TimeoutError)


def pause_s(attempt: int) -> float:
    """[s] before the attempt after the `attempt`-th: full jitter under a doubling bound."""
    bound = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (attempt - 1))
    return _JITTER.uniform(0.0, bound)


class Gate:
    """The seats and the rate of one tool.

    Both belong to an event loop, and every rollout has a loop of its own; they are made anew
    for each, so a rollout may begin with a burst.
    """

    def __init__(self, limits: ToolLimits) -> None:
        self.limits = limits
        self._loop: asyncio.AbstractEventLoop | None = None
        self._seats: asyncio.Semaphore | None = None
        self._rate: AsyncLimiter | None = None

    @asynccontextmanager
    async def seat(self) -> AsyncIterator[None]:
        """Wait for a seat and for the rate, and keep the seat for the block."""
        self._bind()
        if self._seats is None:
            await self._in_time()
            yield
            return
        async with self._seats:
            await self._in_time()
            yield

    async def attempts(self, attempt: Callable[[], Awaitable[Observation]]) -> Observation:
        """The first answer of at most 1 + retries attempts, else the last error."""
        if self.limits.retries == 0:
            return await attempt()
        retrying = AsyncRetrying(
            stop=stop_after_attempt(1 + self.limits.retries),
            retry=retry_if_exception(is_retryable),
            wait=lambda state: pause_s(state.attempt_number),
            before=self._before,
            reraise=True,
        )
        return await retrying(attempt)

    async def _before(self, state: RetryCallState) -> None:
        if state.attempt_number > 1:
            await self._in_time()

    async def _in_time(self) -> None:
        if self._rate is not None:
            await self._rate.acquire()

    def _bind(self) -> None:
        loop = asyncio.get_running_loop()
        if loop is self._loop:
            return
        self._loop = loop
        limits = self.limits
        self._seats = asyncio.Semaphore(limits.concurrency) if limits.concurrency else None
        if limits.per_second is not None:
            burst = max(1.0, limits.per_second)
            self._rate = AsyncLimiter(burst, burst / limits.per_second)
