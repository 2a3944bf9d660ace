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
        self._workers = 0
        self._idle = 0
        """Workers that wait for a call; once a call has come for one, it is not counted."""
        self._backlog = 0
        """Calls for which there was no worker."""
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
