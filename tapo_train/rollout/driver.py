"""One engine in one thread, many coroutines in another that wait for completions.

    caller's thread     take orders ─ step ─ take orders ─ step ─ …
                             ▲            │
                   requests, │            │ completions
                   given up  │            ▼
    episodes' thread    event loop: read turns, call tools, write observations

The engine stays in the thread that made it, as devices and collectives want, and it steps
without waiting for what is computed between two turns. An engine in other processes is stepped
by a thread of its own (`start`), and the caller's is free.
"""

from __future__ import annotations

import asyncio
import math
import queue
from collections.abc import Callable, Coroutine
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from tapo_train.errors import EngineError
from tapo_train.rollout.engine import Completion, Engine, GenerationRequest
from tapo_train.tools.threads import in_new_thread
from tapo_train.types import VersionSpan

T = TypeVar("T")

BREATH_S = 0.001
"""[s] an idle engine waits for further requests after one: those of a group come together, and
a step with one of them would hold up the others."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request, and who waits for it on which loop."""

    request: GenerationRequest
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Completion]


@dataclass(frozen=True, slots=True)
class _GivenUp:
    """Nobody waits for this request any more."""

    id: str


class EngineDriver:
    """Steps an engine and hands completions to the coroutines that wait for them.

    Args:
        version: of the engine's weights, for an engine that does not say it itself.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        end_token_id: int,
        version: int | None = None,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.version = version
        self._engine = engine
        self._end = end_token_id
        self._on_progress = on_progress
        self._waiting: dict[str, _Asked] = {}
        """What the engine works on, by the request's id; the stepping thread's."""
        self._orders: queue.SimpleQueue[_Asked | _GivenUp | None] = queue.SimpleQueue()
        """None: it is time to see whether to go on."""
        self._is_woken = False
        self._is_closed = False
        self._stepping: Future[None] | None = None

    async def generate(self, request: GenerationRequest) -> Completion:
        """Submit a request and wait for its completion; a cancelled wait aborts the request."""
        loop = asyncio.get_running_loop()
        asked = _Asked(request, loop, loop.create_future())
        self._orders.put(asked)
        try:
            return await asked.future
        except asyncio.CancelledError:
            self._orders.put(_GivenUp(request.id))
            raise

    def drive(self, episodes: Coroutine[Any, Any, T]) -> T:
        """Step until the episodes are done; what they return, or the first error of either side.

        Blocks. Nothing is left running, whichever way it ends.
        """
        loop = asyncio.new_event_loop()
        play = loop.create_task(episodes)
        played = in_new_thread(lambda: _played(loop, play), name="episodes")
        try:
            if self._stepping is not None:
                self._await(played)
            else:
                played.add_done_callback(lambda _: self.wake())
                self.step_until(played.done)
            return played.result()
        finally:
            _tell(loop, play.cancel)
            wait((played,))
            if self._stepping is None:
                self.clear()

    def start(self) -> None:
        """Step in a thread of its own from now on, until `close`."""
        self._stepping = in_new_thread(
            lambda: self.step_until(lambda: self._is_closed), name="engine"
        )

    @property
    def stepping(self) -> Future[None] | None:
        """The thread of `start`; it ends before `close` with an error of the engine alone."""
        return self._stepping

    def close(self) -> None:
        """End that thread; what it worked on is aborted."""
        if self._stepping is not None:
            self._is_closed = True
            self.wake()
            wait((self._stepping,))
        self.clear()

    def wake(self) -> None:
        """Have whoever steps see whether to go on. Any thread."""
        self._orders.put(None)

    def step_until(self, is_over: Callable[[], bool]) -> None:
        """Step, or wait for orders; after each, and when woken, see whether it is over."""
        while not is_over():
            self._round()

    def finish(self) -> None:
        """Step until the engine has nothing left. What is asked meanwhile waits for the next time.

        No turn is cut off: a turn that is sampled anew because it took long would become shorter.
        """
        while self._engine.has_unfinished():
            self._step()

    def _await(self, played: Future[T]) -> None:
        assert self._stepping is not None
        either: tuple[Future[Any], ...] = (played, self._stepping)
        wait(either, return_when=FIRST_COMPLETED)
        if not played.done():
            self._stepping.result()
            raise EngineError("the engine's thread was closed before the episodes were over")

    def _round(self) -> None:
        """A step of the engine, then what was ordered meanwhile; or wait for an order."""
        if not self._engine.has_unfinished():
            self._take(math.inf)
            return
        self._take(self._step())

    def _step(self) -> float:
        """A step; how long it is no use to ask again [s]."""
        for completion in self._engine.step():
            self._deliver(completion)
            self._on_progress()
        idle_s = self._engine.idle_s()
        if idle_s <= 0:
            self._on_progress()
        return idle_s

    def _take(self, wait_s: float) -> None:
        """Obey the orders that are there; if there is none, wait so long for the first."""
        self._is_woken = False
        if wait_s > 0 and self._orders.empty():
            try:
                self._obey(self._orders.get(timeout=None if wait_s == math.inf else wait_s))
            except queue.Empty:
                return
        breath_s = BREATH_S if wait_s > 0 else 0.0
        with suppress(queue.Empty):
            while not self._is_woken:
                self._obey(self._orders.get(block=breath_s > 0, timeout=breath_s or None))

    def _obey(self, order: _Asked | _GivenUp | None) -> None:
        if order is None:
            self._is_woken = True
        elif isinstance(order, _Asked):
            self._engine.submit(order.request)
            self._waiting[order.request.id] = order
        elif self._waiting.pop(order.id, None) is not None:
            self._engine.abort([order.id])

    def _deliver(self, completion: Completion) -> None:
        asked = self._waiting.pop(completion.id, None)
        if asked is None:
            raise EngineError(f"the engine returned {completion.id}, which nobody asked for")
        require_complete(completion, asked.request, self._end)
        if not completion.versions and self.version is not None:
            whole = VersionSpan(start=0, end=len(completion.tokens), version=self.version)
            completion = replace(completion, versions=(whole,))
        answered = completion
        _tell(asked.loop, lambda: _answer(asked.future, answered))

    def clear(self) -> None:
        """Have the engine drop what nobody waits for any more; nobody may be stepping."""
        left, self._waiting = list(self._waiting), {}
        if left:
            self._engine.abort(left)


def _played(loop: asyncio.AbstractEventLoop, play: asyncio.Task[T]) -> T:
    """What the episodes return; their loop is closed then, and nothing of it goes on."""
    try:
        return loop.run_until_complete(play)
    finally:
        if left := asyncio.all_tasks(loop):
            for task in left:
                task.cancel()
            loop.run_until_complete(asyncio.wait(left))
        loop.close()


def _answer(future: asyncio.Future[Completion], completion: Completion) -> None:
    if not future.done():  # given up meanwhile
        future.set_result(completion)


def _tell(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    with suppress(RuntimeError):  # the loop is closed: the episodes are over
        loop.call_soon_threadsafe(callback)


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
