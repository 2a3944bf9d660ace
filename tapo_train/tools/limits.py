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
from tapo_train.tools.threads import CallClock, queueing
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
    """[s] for the work of a call, attempts and pauses included; None: the toolbox's."""
    queue_s: float | None = None
    """[s] a call may wait for its turn: a seat, the rate, a thread; None: the toolbox's."""
    retries: int = 0
    """Further attempts after a failure that may pass."""
    price: float = 0.0
    """Of one attempt, in any unit of money."""


def is_retryable(error: BaseException) -> bool:
    """Whether the same call may succeed a moment later. What the policy did wrong never is."""
    if isinstance(error, ToolDownError):
        return error.retryable
    return isinstance(error, ConnectionError | TimeoutError)


def pause_s(attempt: int, asked_s: float = 0.0) -> float:
    """[s] before the attempt after the `attempt`-th: full jitter under a doubling bound.

    Args:
        asked_s: for which the server asks; then a little more than that, each call another.
    """
    if asked_s > 0:
        return asked_s + _JITTER.uniform(0.0, FIRST_PAUSE_S)
    bound = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (attempt - 1))
    return _JITTER.uniform(0.0, bound)


class Gate:
    """The seats and the rate of one tool. On one event loop."""

    def __init__(self, limits: ToolLimits) -> None:
        self._limits = limits
        self._seats = asyncio.Semaphore(limits.concurrency) if limits.concurrency else None
        self._rate: AsyncLimiter | None = None
        if limits.per_second is not None:
            burst = max(1.0, limits.per_second)
            self._rate = AsyncLimiter(burst, burst / limits.per_second)

    @asynccontextmanager
    async def seat(self) -> AsyncIterator[None]:
        """Wait for a seat and for the rate, and keep the seat for the block."""
        if self._seats is None:
            await self._in_time()
            yield
            return
        with queueing():
            await self._seats.acquire()
        try:
            await self._in_time()
            yield
        finally:
            self._seats.release()

    async def attempts(
        self, attempt: Callable[[], Awaitable[Observation]], clock: CallClock, deadline_s: float
    ) -> Observation:
        """The first answer of at most 1 + retries attempts, else the last error.

        One that a server wants to be made after the deadline is not made.
        """
        if self._limits.retries == 0:
            return await attempt()

        def may_pass(error: BaseException) -> bool:
            return is_retryable(error) and clock.worked_s + _asked_s(error) < deadline_s

        retrying = AsyncRetrying(
            stop=stop_after_attempt(1 + self._limits.retries),
            retry=retry_if_exception(may_pass),
            wait=_pause_after,
            before=self._before,
            reraise=True,
        )
        return await retrying(attempt)

    async def _before(self, state: RetryCallState) -> None:
        if state.attempt_number > 1:
            await self._in_time()

    async def _in_time(self) -> None:
        if self._rate is not None:
            with queueing():
                await self._rate.acquire()


def _pause_after(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    return pause_s(state.attempt_number, _asked_s(error))


def _asked_s(error: BaseException | None) -> float:
    """[s] after which the server wants to be asked again; 0 if it does not say."""
    return error.retry_after_s if isinstance(error, ToolDownError) else 0.0
