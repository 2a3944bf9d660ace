"""Threads for blocking tools, which no end of a rollout or of the process waits for.

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
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from tapo_train.errors import ToolDownError

__all__ = ["THREADS", "DaemonThreads", "use_daemon_threads"]

T = TypeVar("T")


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
        self._idle_workers = 0
        self._workers = 0
        self._abandoned = 0

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
            self._calls.put(call)
            self._staff()
        return call

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Nothing: the threads outlive an event loop, and nobody waits for them."""

    def _staff(self) -> None:
        """Start a worker if calls wait and none is free; the guard is held."""
        at_work = self._workers - self._abandoned
        if self._calls.qsize() > self._idle_workers and at_work < self._most:
            self._workers += 1
            threading.Thread(target=self._work, name="tool", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._guard:
                self._idle_workers += 1
            call = self._calls.get()
            with self._guard:
                self._idle_workers -= 1
                # A call that came since may have counted on this worker.
                self._staff()
            call.run()
            with self._guard:
                if call.abandoned:
                    # Another thread was hired in place of this one.
                    self._abandoned -= 1
                    self._workers -= 1
                    return

    def abandon(self, call: _Call[Any]) -> None:
        """Count a running call that nobody waits for, once."""
        with self._guard:
            if not call.abandoned and not call.done():
                call.abandoned = True
                self._abandoned += 1
                self._staff()


class _Call(Future[T]):
    """A call on its way; cancelling it while it runs abandons it."""

    def __init__(self, pool: DaemonThreads, function: Callable[[], T]) -> None:
        super().__init__()
        self._pool = pool
        self._function = function
        self.abandoned = False

    def run(self) -> None:
        """Call the function, in a worker."""
        if not self.set_running_or_notify_cancel():
            return
        try:
            result = self._function()
        except BaseException as error:  # noqa: BLE001  # handed on to whoever waits
            self.set_exception(error)
        else:
            self.set_result(result)

    def cancel(self) -> bool:
        """Cancel it before it runs; count it as abandoned if it runs."""
        cancelled = super().cancel()
        if not cancelled:
            self._pool.abandon(self)
        return cancelled


THREADS = DaemonThreads(64, max_abandoned=256)
"""The threads of this process: blocking tools wait more than they compute."""


def use_daemon_threads() -> None:
    """Make `asyncio.to_thread` in the running loop use THREADS."""
    asyncio.get_running_loop().set_default_executor(THREADS)
