"""Seats, rates, retries, deadlines, prices, and threads nobody waits for."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from decimal import Decimal

import pytest
from aiolimiter import AsyncLimiter
from process_environment import ROOT, environment
from pydantic import BaseModel

from tapo_train.errors import (
    ConfigError,
    ToolArgumentError,
    ToolBudgetError,
    ToolDownError,
    ToolError,
    ToolRefusedError,
)
from tapo_train.tools import limits as limits_module
from tapo_train.tools.base import ToolContext
from tapo_train.tools.ledger import Ledger
from tapo_train.tools.limits import ToolLimits, pause_s
from tapo_train.tools.threads import DaemonThreads
from tapo_train.tools.toolbox import Toolbox
from tapo_train.types import Observation, Outcome, Task

CONTEXT = ToolContext(images=(), task=Task(id="t", question="?", images=(), answers=("a",)))


class Nothing(BaseModel):
    """No arguments."""


class SlowTool:
    """Takes `seconds`, and knows how many calls it has at a time."""

    name = "slow"
    version = "1"
    description = "Takes its time."
    arguments_model: type[BaseModel] = Nothing

    def __init__(self, seconds: float = 0.05) -> None:
        self._seconds = seconds
        self.now = self.most = self.calls = 0
        self.started: list[float] = []

    async def run(self, arguments: BaseModel, context: ToolContext) -> Observation:
        self.started.append(time.perf_counter())
        self.calls += 1
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(self._seconds)
        finally:
            self.now -= 1
        return Observation(text=f"call {self.calls}")


class FailingTool(SlowTool):
    """Raises the errors it was given, one per attempt, then answers."""

    def __init__(self, *errors: Exception) -> None:
        super().__init__(0.0)
        self._errors = list(errors)

    async def run(self, arguments: BaseModel, context: ToolContext) -> Observation:
        self.calls += 1
        if self._errors:
            raise self._errors.pop(0)
        return Observation(text="at last", cached=self.calls == 9)


def box_of(tool: SlowTool, ledger: Ledger | None = None, **limits: object) -> Toolbox:
    chosen = ToolLimits(**limits)  # type: ignore[arg-type]
    return Toolbox([tool], deadline_s=5.0, limits={"slow": chosen}, ledger=ledger)


def calls(box: Toolbox, count: int) -> list[Observation]:
    async def together() -> list[Observation]:
        request = box.read("slow", {})
        tasks = [replace(CONTEXT.task, id=str(number)) for number in range(count)]
        contexts = [replace(CONTEXT, task=task) for task in tasks]  # equal calls would be one
        return await asyncio.gather(*(box.execute(request, context) for context in contexts))

    return asyncio.run(together())


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits_module, "FIRST_PAUSE_S", 0.001)


def test_no_more_calls_run_at_a_time_than_there_are_seats() -> None:
    tool = SlowTool()
    box = box_of(tool, concurrency=2)
    calls(box, 6)
    assert (tool.calls, tool.most) == (6, 2)
    queued = sorted(record.queue_s for record in box.ledger.drain())
    assert queued[1] < 0.045 < queued[2] and queued[4] > 0.09
    free = SlowTool()
    calls(box_of(free), 6)
    assert free.most == 6


def test_the_same_limits_hold_in_every_event_loop() -> None:
    tool = SlowTool(0.01)
    box = box_of(tool, concurrency=1, per_second=1000.0)
    for _ in range(2):
        assert [seen.outcome for seen in calls(box, 3)] == [Outcome.OK] * 3
    assert tool.most == 1


def test_the_rate_is_kept_after_the_first_burst() -> None:
    tool = SlowTool(0.0)
    calls(box_of(tool, per_second=20.0), 24)
    gone = [start - tool.started[0] for start in tool.started]
    assert gone[19] < 0.15 < gone[23] < 2.0
    slow = SlowTool(0.0)
    calls(box_of(slow, per_second=0.8), 2)
    assert slow.started[1] - slow.started[0] > 1.2


def test_waiting_for_a_seat_is_not_held_against_the_deadline() -> None:
    tool = SlowTool(0.06)
    seen = calls(box_of(tool, concurrency=1, deadline_s=0.1), 4)
    assert [answer.outcome for answer in seen] == [Outcome.OK] * 4


def test_a_tools_own_deadline_goes_before_the_common_one() -> None:
    (seen,) = calls(box_of(SlowTool(5.0), deadline_s=0.05), 1)
    assert seen.outcome is Outcome.TIMEOUT and seen.latency_s < 1
    assert seen.text == "Error: slow gave no answer in time: its deadline is 0.05 s"


@pytest.mark.parametrize(
    ("error", "outcome", "attempts"),
    [
        (ToolDownError("502"), Outcome.OK, 3),
        (ConnectionResetError("gone"), Outcome.OK, 3),
        (TimeoutError("read"), Outcome.OK, 3),
        (ToolDownError("no such host", retryable=False), Outcome.INFRA_ERROR, 1),
        (ToolError("no"), Outcome.TOOL_ERROR, 1),
        (ToolRefusedError("guard"), Outcome.REFUSED, 1),
        (ToolArgumentError("yours"), Outcome.MODEL_ERROR, 1),
        (ZeroDivisionError("bug"), Outcome.INFRA_ERROR, 1),
    ],
)
@pytest.mark.usefixtures("short_pauses")
def test_only_what_may_pass_is_tried_again(
    error: Exception, outcome: Outcome, attempts: int
) -> None:
    tool = FailingTool(error, error)
    box = box_of(tool, retries=2)
    (seen,) = calls(box, 1)
    assert (seen.outcome, tool.calls) == (outcome, attempts)
    (record,) = box.ledger.drain()
    assert (record.outcome, record.attempts) == (outcome, attempts)


@pytest.mark.usefixtures("short_pauses")
def test_every_attempt_counts_once_for_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[float] = []

    async def acquire(limiter: AsyncLimiter, amount: float = 1) -> None:
        taken.append(amount)

    monkeypatch.setattr(AsyncLimiter, "acquire", acquire)
    calls(box_of(FailingTool(*[ToolDownError("down")] * 3), retries=3, per_second=2.0), 1)
    assert taken == [1, 1, 1, 1]


@pytest.mark.usefixtures("short_pauses")
def test_attempts_are_bounded_and_the_last_words_are_kept() -> None:
    tool = FailingTool(ToolDownError("first"), ToolDownError("second"), ToolDownError("third"))
    (seen,) = calls(box_of(tool, retries=1), 1)
    assert seen.outcome is Outcome.INFRA_ERROR and seen.text == "Error: slow failed: second"


def test_the_deadline_covers_all_attempts_and_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits_module, "pause_s", lambda attempt, asked_s: 0.04)
    tool = FailingTool(*[ToolDownError("down")] * 100)
    (seen,) = calls(box_of(tool, retries=99, deadline_s=0.1), 1)
    assert seen.outcome is Outcome.TIMEOUT and 2 <= tool.calls <= 4


def test_pauses_are_random_below_a_bound_that_doubles_up_to_a_limit() -> None:
    for attempt, bound in ((1, 0.5), (2, 1.0), (3, 2.0), (5, 8.0), (50, 8.0)):
        pauses = [pause_s(attempt) for _ in range(300)]
        assert 0 <= min(pauses) < 0.1 * bound and 0.9 * bound < max(pauses) <= bound


@pytest.mark.usefixtures("short_pauses")
def test_each_attempt_is_paid_and_what_a_store_answered_is_not() -> None:
    ledger = Ledger()
    calls(box_of(FailingTool(ToolDownError("x")), ledger, retries=1, price=0.5), 1)
    assert ledger.spent == 1.0
    (record,) = ledger.drain()
    assert (record.cost, record.cached) == (1.0, False)
    stored = FailingTool()
    stored.calls = 8
    calls(box_of(stored, ledger, price=0.5), 1)
    (record,) = ledger.drain()
    assert (record.cost, record.cached, ledger.spent) == (0.0, True, 1.0)


def test_a_call_that_the_purse_cannot_pay_for_is_not_made() -> None:
    ledger, tool = Ledger(), SlowTool(0.01)
    ledger.fill(Decimal("0.3"))
    box = box_of(tool, ledger, price=0.1)
    seen = calls(box, 5)
    assert (tool.calls, ledger.spent, ledger.is_exhausted) == (3, Decimal("0.3"), True)
    assert [answer.outcome for answer in seen] == [Outcome.OK] * 3 + [Outcome.INFRA_ERROR] * 2
    ledger.fill(Decimal("0.1"))
    assert (ledger.spent, ledger.is_exhausted) == (0, False)
    ledger.charge(0.1)
    with pytest.raises(ToolBudgetError, match=r"a call for 0\.1 is not made: 0\.1 is spent"):
        ledger.charge(0.1)


def test_limits_for_a_tool_that_is_not_there_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"tools\.limits\.slwo: there is no such tool"):
        Toolbox([SlowTool()], deadline_s=1, limits={"slwo": ToolLimits()})
    strange = SlowTool()
    strange.name = "a b"
    with pytest.raises(ConfigError, match="found the name 'a b'"):
        Toolbox([strange], deadline_s=1)


class AbsentMinded(SlowTool):
    """Forgets to answer."""

    async def run(self, arguments: BaseModel, context: ToolContext) -> Observation:
        return None  # type: ignore[return-value]


def test_an_answer_that_is_no_observation_is_the_tools_own_fault() -> None:
    (seen,) = calls(box_of(AbsentMinded()), 1)
    assert seen.outcome is Outcome.INFRA_ERROR
    assert "found NoneType, wanted an Observation" in seen.text


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What blocked threads wait for."""
    event = threading.Event()
    yield event
    event.set()


def settle(condition: Callable[[], bool]) -> None:
    for _ in range(200):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come about")


def test_an_abandoned_call_gives_its_place_to_another_and_is_counted(
    gate: threading.Event,
) -> None:
    pool = DaemonThreads(1, max_abandoned=2)
    hung: Future[bool] = pool.submit(gate.wait)
    settle(hung.running)
    behind = pool.submit(lambda: "done")
    assert not behind.done() and pool.num_abandoned == 0
    assert hung.cancel() is False and hung.cancel() is False
    assert behind.result(timeout=2) == "done"
    assert pool.num_abandoned == 1
    second: Future[bool] = pool.submit(gate.wait)
    settle(second.running)
    second.cancel()
    with pytest.raises(ToolDownError, match="2 earlier calls hang"):
        pool.submit(lambda: "never")
    gate.set()
    settle(lambda: pool.num_abandoned == 0)
    assert pool.submit(lambda: "again").result(timeout=2) == "again"


def test_threads_hand_on_results_and_errors_and_are_reused() -> None:
    pool = DaemonThreads(2, max_abandoned=1)
    before = threading.active_count()
    squares = [pool.submit(lambda n: n * n, n) for n in range(50)]
    assert [call.result(timeout=2) for call in squares] == [n * n for n in range(50)]
    with pytest.raises(ZeroDivisionError):
        pool.submit(lambda: 1 / 0).result(timeout=2)
    assert threading.active_count() <= before + 2


def test_as_many_calls_run_side_by_side_as_there_are_threads() -> None:
    pool, meeting = DaemonThreads(8, max_abandoned=1), threading.Barrier(8)
    for _ in range(20):
        together = [pool.submit(meeting.wait, 2.0) for _ in range(8)]
        assert sorted(call.result(timeout=2) for call in together) == list(range(8))


def test_a_hung_thread_holds_up_neither_the_loop_nor_the_process() -> None:
    program = (
        "import asyncio, time, sys\n"
        "sys.path.insert(0, 'tests')\n"
        "from test_tools_limits import *\n"
        "from tapo_train.tools.threads import num_abandoned\n"
        "class Hung(SlowTool):\n"
        "    async def run(self, arguments, context):\n"
        "        await asyncio.to_thread(time.sleep, 60)\n"
        "started = time.perf_counter()\n"
        "(seen,) = calls(box_of(Hung(), deadline_s=0.1), 1)\n"
        "assert time.perf_counter() - started < 3\n"
        "print(seen.outcome.value, num_abandoned())\n"
    )
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.stdout.split() == ["timeout", "1"], done.stderr
    assert time.perf_counter() - started < 30
