"""One engine, many coroutines that wait for completions."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from tapo_train.errors import EngineError
from tapo_train.rollout.engine import Completion, Engine, GenerationRequest

T = TypeVar("T")

TURNS_OF_THE_LOOP = 4
"""Event-loop rounds between engine steps: a tool's answer passes through a few
callbacks before its next request is submitted, and each costs one round."""


class EngineDriver:
    """Steps an engine and hands completions to the coroutines that wait for them."""

    def __init__(
        self,
        engine: Engine,
        *,
        end_token_id: int,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._end = end_token_id
        self._on_progress = on_progress
        self._waiting: dict[str, tuple[GenerationRequest, asyncio.Future[Completion]]] = {}
        self._wake = asyncio.Event()

    async def generate(self, request: GenerationRequest) -> Completion:
        """Submit a request and wait for its completion; a cancelled wait aborts the request."""
        self._engine.submit(request)
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._waiting[request.id] = (request, future)
        self._wake.set()
        try:
            return await future
        except asyncio.CancelledError:
            if self._waiting.pop(request.id, None) is not None:
                self._engine.abort([request.id])
            raise

    async def drive(self, episodes: asyncio.Future[T]) -> T:
        """Step until the episodes are done; what they return, or their first error.

        Nothing is left running, whichever way it ends.
        """
        try:
            return await self._drive(episodes)
        finally:
            episodes.cancel()
            await asyncio.gather(episodes, return_exceptions=True)

    async def _drive(self, episodes: asyncio.Future[T]) -> T:
        episodes.add_done_callback(lambda _: self._wake.set())
        while not episodes.done():
            if not self._engine.has_unfinished():
                await self._sleep(math.inf)
                continue
            for completion in self._engine.step():
                self._deliver(completion)
                self._on_progress()
            idle_s = self._engine.idle_s()
            if idle_s > 0:
                await self._sleep(idle_s)
                continue
            self._on_progress()
            for _ in range(TURNS_OF_THE_LOOP):
                await asyncio.sleep(0)
        return episodes.result()

    async def _sleep(self, seconds: float) -> None:
        """Until a request is submitted or the episodes are done, but not for longer."""
        self._wake.clear()
        loop = asyncio.get_running_loop()
        timer = loop.call_later(seconds, self._wake.set) if seconds < math.inf else None
        await self._wake.wait()
        if timer is not None:
            timer.cancel()

    def _deliver(self, completion: Completion) -> None:
        if completion.id not in self._waiting:
            raise EngineError(f"the engine returned {completion.id}, which nobody asked for")
        request, future = self._waiting.pop(completion.id)
        require_complete(completion, request, self._end)
        future.set_result(completion)


def require_complete(completion: Completion, request: GenerationRequest, end: int) -> None:
    """Raise EngineError if a completion breaks the protocol.

    An engine that ends a turn on another token, or reports fewer log-probabilities
    than tokens, would shift every later span silently.
    """
    tokens, logprobs = completion.tokens, completion.logprobs
    ends = len(tokens) > 0 and int(tokens[-1]) == end
    if len(tokens) != len(logprobs) or not 0 < len(tokens) <= request.max_tokens:
        raise EngineError(
            f"request {request.id}: {len(tokens)} tokens with {len(logprobs)} log-probabilities; "
            f"wanted equal numbers between 1 and {request.max_tokens}"
        )
    if ends != (completion.finished == "stop"):
        raise EngineError(
            f"request {request.id}: finished by {completion.finished!r} with last token "
            f"{int(tokens[-1])}; the end token is {end}"
        )
    if not np.isfinite(logprobs).all():
        raise EngineError(f"request {request.id}: a log-probability is not finite")
