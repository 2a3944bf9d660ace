"""The way of one call, from the policy's request to what it reads.

    an equal call is under way ── its answer, for nothing
    it is recorded             ── that answer, for nothing           Replay
    a seat, the rate           waited for at most queue_s            Gate
    attempts                   pay, run, open the pictures           deadline_s, retries
    the answer is recorded, what it took and cost is noted           Replay, Ledger

Whatever happens on the way becomes an `Observation` with a typed outcome, so a failing tool
never takes a trajectory down and never goes unnoticed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import BaseModel

from tapo_train.errors import ReplayMissError, ToolDownError, ToolError
from tapo_train.tools.base import THREADS, CallName, Tool, ToolContext, call_name, failure
from tapo_train.tools.images import ResultPictures
from tapo_train.tools.ledger import CallRecord, Ledger
from tapo_train.tools.limits import Gate, ToolLimits
from tapo_train.tools.recording import Replay
from tapo_train.tools.threads import CLOCK, POOL, CallClock, DaemonThreads
from tapo_train.types import Observation, Outcome

__all__ = ["CallPolicy"]

MOST_HUNG = 256
"""Calls of a tool that may hang in their threads; then further ones fail at once."""
_ROUNDS_OF_GRACE = 4


@dataclass(slots=True, kw_only=True)
class CallPolicy:
    """What holds for all calls of one tool. Lives on the tools' event loop."""

    tool: Tool
    limits: ToolLimits
    deadline_s: float
    """[s] for the work of a call."""
    queue_s: float
    """[s] a call may wait for its turn."""
    ledger: Ledger
    pictures: ResultPictures
    replay: Replay | None = None
    gate: Gate = field(init=False)
    threads: DaemonThreads = field(init=False)
    _flights: dict[str, _Flight] = field(init=False, default_factory=dict)
    """Calls under way that others may join, by the key of their name."""
    _works: set[asyncio.Task[Observation]] = field(init=False, default_factory=set)
    """Everything that has not ended, given up or not."""

    def __post_init__(self) -> None:
        self.gate = Gate(self.limits)
        self.threads = DaemonThreads(
            getattr(self.tool, "max_threads", THREADS), max_abandoned=MOST_HUNG
        )

    async def answer(self, arguments: BaseModel, context: ToolContext) -> Observation:
        """What the policy reads. Calls that are equal and under way together are made once.

        Raises:
            ReplayMissError: a strict replay does not know the call.
        """
        try:
            name = call_name(self.tool, arguments, context)
        except (ValueError, TypeError) as error:
            down = ToolDownError(f"its arguments cannot be written as JSON: {error}")
            return failure(self.tool.name, down)
        flight = self._flights.get(name.key)
        if flight is not None and not flight.is_given_up:
            return await self._joined(flight)
        flight = _Flight(self._begin(self._made(name, arguments, context)))
        self._flights[name.key] = flight
        flight.task.add_done_callback(lambda _: self._land(name.key, flight))
        return await flight.answer()

    def _land(self, key: str, flight: _Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]

    async def settle(self, within_s: float) -> None:
        """Wait until what was given up has ended, but no longer than that."""
        last = asyncio.get_running_loop().time() + within_s
        for _ in range(_ROUNDS_OF_GRACE):  # a trajectory that ended gives its calls up in steps
            await asyncio.sleep(0)
        while late := {task for task in self._works if task.cancelling()}:
            left_s = last - asyncio.get_running_loop().time()
            if left_s <= 0:
                return
            await asyncio.wait(late, timeout=left_s)

    async def _joined(self, flight: _Flight) -> Observation:
        started = time.perf_counter()
        observation = await flight.answer()
        waited_s = time.perf_counter() - started
        self.ledger.add(
            CallRecord(
                tool=self.tool.name,
                outcome=observation.outcome,
                latency_s=waited_s,
                queue_s=0.0,
                attempts=1,
                cached=True,
                cost=0.0,
            )
        )
        return replace(observation, latency_s=waited_s, cached=True)

    async def _made(
        self, name: CallName, arguments: BaseModel, context: ToolContext
    ) -> Observation:
        """Make the call, and note it."""
        call = _Call(policy=self, name=name, arguments=arguments, context=context)
        CLOCK.set(call.clock)
        POOL.set(self.threads)
        observation = await self._outcome(call)
        worked_s = call.clock.worked_s
        self.ledger.add(
            CallRecord(
                tool=name.tool,
                outcome=observation.outcome,
                latency_s=worked_s,
                queue_s=call.clock.waited_s,
                attempts=max(1, call.attempts),
                cached=observation.cached,
                cost=call.cost,
            )
        )
        return replace(observation, latency_s=worked_s)

    async def _outcome(self, call: _Call) -> Observation:
        try:
            return await self._in_time(call.make(), call.clock)
        except TimeoutError as error:
            text = f"Error: {self.tool.name} gave no answer in time: {error}"
            return Observation(text=text, outcome=Outcome.TIMEOUT)
        except ToolError as error:
            return failure(self.tool.name, error)
        except ReplayMissError:
            raise  # the run has left its recording: no single call's failure
        except Exception as error:  # noqa: BLE001  # the tool boundary: recorded, not fatal
            text = f"Error: {self.tool.name} failed: {type(error).__name__}: {error}"
            return Observation(text=text, outcome=Outcome.INFRA_ERROR)

    async def _in_time(
        self, work: Coroutine[Any, Any, Observation], clock: CallClock
    ) -> Observation:
        """The answer; TimeoutError once the call has worked, or waited, for too long.

        A tool that blocks this loop may hold it for longer than the deadline. A call that
        finished meanwhile is not late: its answer is in the loop's queue behind the timer, so
        the loop gets a few rounds before the call is given up.
        """
        task = self._begin(work)
        try:
            while not task.done() and (left := self._left_s(clock)) > 0:
                await asyncio.wait((task,), timeout=left)
            for _ in range(_ROUNDS_OF_GRACE):
                if not task.done():
                    await asyncio.sleep(0)
        finally:
            if not task.done():
                task.cancel()
        if not task.done():
            raise TimeoutError(
                f"its deadline is {self.deadline_s:g} s"
                if clock.worked_s >= self.deadline_s
                else f"it waited for {self.queue_s:g} s for its turn; so many calls are under way"
            )
        return task.result()

    def _left_s(self, clock: CallClock) -> float:
        return min(self.deadline_s - clock.worked_s, self.queue_s - clock.waited_s)

    def _begin(self, work: Coroutine[Any, Any, Observation]) -> asyncio.Task[Observation]:
        task = asyncio.ensure_future(work)
        self._works.add(task)
        task.add_done_callback(self._works.discard)
        return task


@dataclass(slots=True)
class _Flight:
    """A call under way, and how many trajectories wait for it."""

    task: asyncio.Task[Observation]
    waiting: int = 0
    is_given_up: bool = False

    async def answer(self) -> Observation:
        """The call's answer; given up when nobody waits for it any more."""
        self.waiting += 1
        try:
            return await asyncio.shield(self.task)
        finally:
            self.waiting -= 1
            if not self.waiting and not self.task.done():
                self.is_given_up = True
                self.task.cancel()


@dataclass(slots=True, kw_only=True)
class _Call:
    """One call, as it is made."""

    policy: CallPolicy
    name: CallName
    arguments: BaseModel
    context: ToolContext
    clock: CallClock = field(default_factory=CallClock)
    attempts: int = 0
    cost: float = 0.0

    async def make(self) -> Observation:
        """The recorded answer, else the tool's, which is recorded."""
        policy = self.policy
        if policy.replay is not None:
            known = await policy.replay.known(self.name)
            if known is not None:
                return known
        async with policy.gate.seat():
            answer = await policy.gate.attempts(self._attempt, self.clock, policy.deadline_s)
        return answer if policy.replay is None else await policy.replay.keep(self.name, answer)

    async def _attempt(self) -> Observation:
        """What the tool answers, a "no" included; raises what is no answer."""
        policy, price = self.policy, self.policy.limits.price
        self.attempts += 1
        policy.ledger.charge(price)
        self.cost += price
        try:
            answer = await policy.tool.run(self.arguments, self.context)
        except ToolDownError:
            raise
        except ToolError as error:
            return failure(policy.tool.name, error)
        if not isinstance(answer, Observation):
            raise TypeError(f"found {type(answer).__name__}, wanted an Observation")
        if answer.cached:
            policy.ledger.give_back(price)
            self.cost -= price
        if answer.images:
            images = await asyncio.to_thread(policy.pictures.taken, answer.images)
            answer = replace(answer, images=images)
        return answer
