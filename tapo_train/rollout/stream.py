"""Groups under way on one engine, from one update to the next.

    same device          `wait` steps the engine in the caller's thread until enough is complete,
                         and then until no turn is left in it. Episodes and tools go on meanwhile;
                         what they ask the engine waits for the next `wait`, and other weights.
    devices of its own   the driver's thread steps the engine all the time; `wait` only waits.

Episodes are played on an event loop in a thread that lives as long as the stream.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable
from concurrent.futures import Future, wait

from tapo_train.rollout.clock import PlayClock
from tapo_train.rollout.driver import EngineDriver
from tapo_train.rollout.group import Field, Places, Rules
from tapo_train.rollout.seats import Seats
from tapo_train.tools.threads import in_new_thread
from tapo_train.types import Group, Task

__all__ = ["GroupStream"]

OnComplete = Callable[[int, Group], None]
"""Told (number, group) on the episodes' thread."""


class GroupStream:
    """Plays groups by number.

    Args:
        max_in_flight: most episodes under way at a time; None: as many as there are `seats`.
    """

    def __init__(
        self, rules: Rules, driver: EngineDriver, *, seats: Seats, max_in_flight: int | None = None
    ) -> None:
        self._rules = rules
        self._driver = driver
        self._seats = seats
        self._most = max_in_flight
        self._places = Places(max_in_flight or seats.free())
        self._clock = PlayClock()
        self._field = Field(
            rules=rules, generate=driver.generate, places=self._places, clock=self._clock
        )
        self._played: list[Group] = []
        """Since the last look at how long trajectories have become."""
        self._loop = asyncio.new_event_loop()
        self._thread = in_new_thread(self._loop.run_forever, name="episodes")
        self._news: queue.SimpleQueue[Future[None]] = queue.SimpleQueue()
        """Groups that ended, well or not; the engine's thread, should it end."""
        if driver.stepping is not None:
            driver.stepping.add_done_callback(self._news.put)

    def begin(self, number: int, task: Task, *, version: int, on_complete: OnComplete) -> None:
        """Have a group begin with the weights of `version`. Any thread.

        DataError, raised by `wait`: its prompt leaves no room for an answer.
        """
        work = self._play(number, task, version, on_complete)
        played = asyncio.run_coroutine_threadsafe(work, self._loop)
        played.add_done_callback(self._ended)

    def wait(self, enough: Callable[[], bool], *, version: int) -> None:
        """Until `enough`, which is asked whenever a group has ended.

        Blocks. Raises what ended a group, or the engine's thread.

        Args:
            version: of the engine's weights, if it does not say it itself.
        """
        if self._driver.stepping is not None:
            self._resize()
            while not enough():
                self._news.get().result()
        else:
            self._step(enough, version)
        with self._rules.toolbox.settled():
            self._heard()

    def close(self) -> None:
        """Drop what is under way. The first call does it."""
        if self._loop.is_closed():
            return
        with self._rules.toolbox.settled():
            asyncio.run_coroutine_threadsafe(_end_others(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        wait((self._thread,))
        self._loop.close()
        self._driver.close()

    def _step(self, enough: Callable[[], bool], version: int) -> None:
        self._driver.version = version
        self._resize()
        self._loop.call_soon_threadsafe(self._clock.go_on)
        try:
            self._driver.step_until(lambda: self._heard() and enough())
            self._driver.finish()
        finally:
            self._loop.call_soon_threadsafe(self._clock.stop)

    def _heard(self) -> bool:
        """True; raises what went wrong with what has ended."""
        while not self._news.empty():
            self._news.get().result()
        return True

    def _resize(self) -> None:
        played, self._played = self._played, []
        self._seats.observe(played)
        size = self._most or self._seats.free()
        self._loop.call_soon_threadsafe(self._places.resize, size)

    async def _play(self, number: int, task: Task, version: int, on_complete: OnComplete) -> None:
        group = await self._field.play(
            task,
            self._rules.prompt(task),
            name=f"{task.id}/{version}.0",
            policy_version=version,
            until=self._clock.now() + self._rules.deadlines.step_s,
        )
        self._played.append(group)
        on_complete(number, group)

    def _ended(self, played: Future[None]) -> None:
        self._news.put(played)
        self._driver.wake()


async def _end_others() -> None:
    """Every other task of this loop is cancelled, and over."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
