"""The driver between coroutines and an engine: sleep, wake, give up."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted_engine import ScriptedEngine

from tapo_train.errors import EngineError
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.driver import EngineDriver
from tapo_train.rollout.engine import Completion, GenerationRequest, Sampling


@pytest.fixture(scope="module")
def chat(tiny_qwen3_vl: Path) -> ChatFormat:
    return ChatFormat(tiny_qwen3_vl)


class AbsentEngine(ScriptedEngine):
    """Works elsewhere: a turn is there `delay_s` after it was submitted."""

    delay_s = 0.1

    def submit(self, request: GenerationRequest) -> None:
        super().submit(request)
        self.ready = time.perf_counter() + self.delay_s

    def idle_s(self) -> float:
        return max(0.0, self.ready - time.perf_counter()) if self._left else 0.0

    def step(self) -> list[Completion]:
        self.num_steps += 1
        is_early = time.perf_counter() < self.ready
        return [] if is_early else super().step()


def request(id: str) -> GenerationRequest:
    tokens = np.array([1, 2, 3], dtype=np.int32)
    return GenerationRequest(id=id, tokens=tokens, images=(), max_tokens=50, sampling=Sampling())


def driven(
    engine: ScriptedEngine, play: Callable[[EngineDriver], Coroutine[Any, Any, list[Completion]]]
) -> list[Completion]:
    """What `play` returns while a driver steps the engine."""

    driver = EngineDriver(engine, end_token_id=engine.chat.end_token_id)
    return driver.drive(play(driver))


def test_an_engine_that_works_elsewhere_is_not_asked_before_it_can_answer(
    chat: ChatFormat,
) -> None:
    engine = AbsentEngine(chat, lambda _: "x")

    async def play(driver: EngineDriver) -> list[Completion]:
        return [await driver.generate(request("a"))]

    started = time.perf_counter()
    (completion,) = driven(engine, play)
    elapsed = time.perf_counter() - started
    assert completion.id == "a"
    assert engine.num_steps <= 4, "once when it was submitted, once when it was due"
    assert 0.1 <= elapsed < 0.5


def test_a_request_wakes_the_driver_of_an_idle_engine(chat: ChatFormat) -> None:
    """The second request is answered long before the first one would have been."""
    engine = AbsentEngine(chat, lambda _: "x")
    engine.delay_s = 60.0

    async def play(driver: EngineDriver) -> list[Completion]:
        first = asyncio.ensure_future(driver.generate(request("slow")))
        await asyncio.sleep(0.02)
        engine.delay_s = 0.02
        second = await driver.generate(request("fast"))
        return [await first, second]

    started = time.perf_counter()
    assert [completion.id for completion in driven(engine, play)] == ["slow", "fast"]
    assert time.perf_counter() - started < 5


def test_a_wait_that_is_given_up_aborts_its_request_alone(chat: ChatFormat) -> None:
    engine = ScriptedEngine(chat, lambda _: "x", steps=50)

    async def play(driver: EngineDriver) -> list[Completion]:
        late = asyncio.ensure_future(driver.generate(request("late")))
        kept = asyncio.ensure_future(driver.generate(request("kept")))
        await asyncio.sleep(0)
        late.cancel()
        return [await kept]

    assert [completion.id for completion in driven(engine, play)] == ["kept"]
    assert engine.aborted == ["late"]
    assert not engine.has_unfinished()


def test_the_requests_of_a_run_that_fails_do_not_stay_in_the_engine(chat: ChatFormat) -> None:
    engine = ScriptedEngine(chat, lambda _: "x", steps=10**9)

    async def play(driver: EngineDriver) -> list[Completion]:
        waiting = [asyncio.ensure_future(driver.generate(request(id))) for id in "ab"]
        try:
            while engine.most_in_flight < 2:
                await asyncio.sleep(0.001)
            raise RuntimeError("broken")
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    with pytest.raises(RuntimeError, match="broken"):
        driven(engine, play)
    assert sorted(engine.aborted) == ["a", "b"]
    assert not engine.has_unfinished()


class SlowEngine(ScriptedEngine):
    """Holds its thread for a step, until it is let."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.threads: set[int] = set()
        self.in_step, self.may_go_on = threading.Event(), threading.Event()

    def submit(self, request: GenerationRequest) -> None:
        self.threads.add(threading.get_ident())
        super().submit(request)

    def step(self) -> list[Completion]:
        self.threads.add(threading.get_ident())
        self.in_step.set()
        assert self.may_go_on.wait(20)
        return super().step()

    def abort(self, ids: Sequence[str]) -> None:
        self.threads.add(threading.get_ident())
        super().abort(ids)


def test_episodes_go_on_during_a_step_and_the_engine_keeps_to_its_thread(
    chat: ChatFormat,
) -> None:
    engine = SlowEngine(chat, lambda _: "x", steps=2)

    async def play(driver: EngineDriver) -> list[Completion]:
        waiting = asyncio.ensure_future(driver.generate(request("a")))
        late = asyncio.ensure_future(driver.generate(request("b")))
        while not engine.in_step.is_set():
            await asyncio.sleep(0.001)
        late.cancel()
        await asyncio.sleep(0.01)  # the step is still going on
        assert threading.get_ident() not in engine.threads
        engine.may_go_on.set()
        return [await waiting]

    assert [completion.id for completion in driven(engine, play)] == ["a"]
    assert engine.threads == {threading.get_ident()}
    assert engine.aborted == ["b"]


def test_an_error_of_the_engine_ends_the_episodes_and_is_the_one_that_is_told(
    chat: ChatFormat,
) -> None:
    ended = []

    class Broken(ScriptedEngine):
        def step(self) -> list[Completion]:
            raise EngineError("out of memory")

    async def play(driver: EngineDriver) -> list[Completion]:
        try:
            return [await driver.generate(request("a"))]
        finally:
            ended.append(True)

    engine = Broken(chat, lambda _: "x")
    with pytest.raises(EngineError, match="out of memory"):
        driven(engine, play)
    assert ended == [True] and not engine.has_unfinished()


def test_what_an_episode_left_running_ends_with_the_others(chat: ChatFormat) -> None:
    ended = []

    async def forever() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            ended.append(True)

    async def play(driver: EngineDriver) -> list[Completion]:
        left = asyncio.ensure_future(forever())
        await asyncio.sleep(0)
        assert not left.done()
        return []

    assert driven(ScriptedEngine(chat, lambda _: "x"), play) == []
    assert ended == [True]
