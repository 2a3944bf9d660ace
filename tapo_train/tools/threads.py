"""Where tools work: an event loop of their own, and threads that nobody waits for.

The loop (`TOOLS`) lives as long as the process, so connections outlive a rollout, and the
engine's steps do not hold up the sockets of tools.

asyncio's own executor is joined when its loop ends, and again when the interpreter does: one
tool that hangs would hold up both for ever. Here workers are daemons and nobody joins them. A
call that was given up while it runs keeps its thread until it returns, if ever; it is counted
(`num_abandoned`), another thread takes its place, and it is what such a run leaks: the thread,
and whatever the call holds.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar
from weakref import WeakSet

from tapo_train.errors import ToolDownError

__all__ = [
    "CLOCK",
    "POOL",
    "TOOLS",
    "CallClock",
    "DaemonThreads",
    "LoopThread",
    "in_new_thread",
    "num_abandoned",
    "queueing",
]

T = TypeVar("T")


class CallClock:
    """How long a call has worked, and how long it has waited for a free place. Any thread."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self._lock = threading.Lock()
        self._queues = 0
        """In which the call stands at this moment."""
        self._since = 0.0
        self._waited = 0.0

    def begin_to_wait(self) -> None:
        """From now on the call does not work."""
        with self._lock:
            if self._queues == 0:
                self._since = time.perf_counter()
            self._queues += 1

    def end_waiting(self) -> None:
        """One of its waits is over."""
        with self._lock:
            self._queues -= 1
            if self._queues == 0:
                self._waited += time.perf_counter() - self._since

    @property
    def waited_s(self) -> float:
        """[s] in queues."""
        with self._lock:
            running = time.perf_counter() - self._since if self._queues else 0.0
            return self._waited + running

    @property
    def worked_s(self) -> float:
        """[s] since the call began, queues not counted."""
        return time.perf_counter() - self._begun - self.waited_s


CLOCK: ContextVar[CallClock | None] = ContextVar("clock", default=None)
"""Of the call that runs; threads of the call see it, too."""


@contextmanager
def queueing() -> Iterator[None]:
    """What is waited for in the block is a free place: not the work of the call that runs."""
    clock = CLOCK.get()
    if clock is None:
        yield
        return
    clock.begin_to_wait()
    try:
        yield
    finally:
        clock.end_waiting()


class _Work(Future[T]):
    """A function on its way through a thread."""

    def __init__(self, function: Callable[[], T]) -> None:
        super().__init__()
        self._function = function

    def run(self) -> None:
        """Call the function, in a thread."""
        if not self.set_running_or_notify_cancel():
            return
        try:
            result = self._function()
        except BaseException as error:  # noqa: BLE001  # handed on to whoever waits
            self.set_exception(error)
        else:
            self.set_result(result)


def in_new_thread(function: Callable[[], T], *, name: str) -> Future[T]:
    """Call `function` in a daemon thread that ends with it."""
    work = _Work(function)
    threading.Thread(target=work.run, name=name, daemon=True).start()
    return work


class DaemonThreads(ThreadPoolExecutor):
    """An executor of daemon threads that is never waited for.

    A subclass only because an event loop takes no other class as its default executor.

    Args:
        max_threads: most threads at work, those of abandoned calls not counted.
        max_abandoned: so many calls may hang; then every further one fails at once.
    """

    def __init__(self, max_threads: int, *, max_abandoned: int) -> None:
        super().__init__(max_threads)
        self._most = max_threads
        self._most_abandoned = max_abandoned
        self._calls: queue.SimpleQueue[_Call[Any]] = queue.SimpleQueue()
        self._guard = threading.Lock()
        self._workers = 0
        self._idle = 0
        """Workers that wait for a call; once a call has come for one, it is not counted."""
        self._backlog = 0
        """Calls for which there was no worker."""
        self._abandoned = 0
        _POOLS.add(self)

    @property
    def num_abandoned(self) -> int:
        """Calls that nobody waits for any more and that still hold a thread."""
        return self._abandoned

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Have a worker call `fn`.

        Raises:
            ToolDownError: too many earlier calls hang.
        """
        call = _Call(self, lambda: fn(*args, **kwargs))
        with self._guard:
            if self._abandoned >= self._most_abandoned:
                raise ToolDownError(
                    f"{self._abandoned} earlier calls hang in their threads; no more are started",
                    retryable=False,
                )
            call.stand_in_line()
            if self._idle:
                self._idle -= 1
            else:
                self._backlog += 1
                self._hire()
        self._calls.put(call)
        return call

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Nothing: the threads outlive an event loop, and nobody waits for them."""

    def _hire(self) -> None:
        """Start a worker if a call has none and one may be started; the guard is held."""
        if self._backlog and self._workers - self._abandoned < self._most:
            self._backlog -= 1
            self._workers += 1
            threading.Thread(target=self._work, name="tool", daemon=True).start()

    def _work(self) -> None:
        while True:
            call = self._calls.get()
            call.run()
            # Only here, as a worker that needed the guard at the start of a call as well would
            # make whoever submits the next one wait for it.
            with self._guard:
                if call.abandoned:
                    # Another thread was hired in place of this one.
                    self._abandoned -= 1
                    self._workers -= 1
                    return
                if self._backlog:
                    self._backlog -= 1
                else:
                    self._idle += 1

    def abandon(self, call: _Call[Any]) -> None:
        """Count a running call that nobody waits for, once."""
        with self._guard:
            if not call.abandoned and not call.done():
                call.abandoned = True
                self._abandoned += 1
                self._hire()


class _Call(_Work[T]):
    """A call on its way; cancelling it while it runs abandons it."""

    def __init__(self, pool: DaemonThreads, function: Callable[[], T]) -> None:
        super().__init__(function)
        self._pool = pool
        self._clock: CallClock | None = None
        self.abandoned = False

    def stand_in_line(self) -> None:
        """Until a worker takes it, the tool call that it is part of does not work."""
        self._clock = CLOCK.get()
        if self._clock is not None:
            self._clock.begin_to_wait()

    def set_running_or_notify_cancel(self) -> bool:
        """A worker has taken it."""
        if self._clock is not None:
            self._clock.end_waiting()
        return super().set_running_or_notify_cancel()

    def cancel(self) -> bool:
        """Cancel it before it runs; count it as abandoned if it runs."""
        cancelled = super().cancel()
        if not cancelled:
            self._pool.abandon(self)
        return cancelled


_POOLS: WeakSet[DaemonThreads] = WeakSet()


def num_abandoned() -> int:
    """Hung calls of all pools of this process."""
    return sum(pool.num_abandoned for pool in list(_POOLS))


THREADS = DaemonThreads(64, max_abandoned=256)
"""For blocking work that is no tool's own: recordings."""
POOL: ContextVar[DaemonThreads] = ContextVar("pool", default=THREADS)
"""Of the tool whose call runs: one that waits for ever starves no other tool."""


class _PoolOfCall(ThreadPoolExecutor):
    """What `asyncio.to_thread` uses on the tools' loop: the pool of the tool whose call runs."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        return POOL.get().submit(fn, *args, **kwargs)


class LoopThread:
    """An event loop that runs in a daemon thread from its first use to the process's end."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._guard = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run `work` on the loop; cancelling the future cancels the work."""
        return asyncio.run_coroutine_threadsafe(work, self._running())

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._guard:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._loop.set_default_executor(_PoolOfCall(1))
                threading.Thread(
                    target=self._loop.run_forever, name=self._name, daemon=True
                ).start()
            return self._loop


TOOLS = LoopThread("tools")
"""The loop of this process's tools."""
