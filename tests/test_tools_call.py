"""The way of one call: equal calls, queues and deadlines, threads, pictures."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from loopback import fetching, response, saying
from PIL import Image as Pillow
from pydantic import BaseModel
from rollout_world import draw_image

from tapo_train.errors import ReplayMissError, ToolDownError
from tapo_train.tools.base import ToolContext
from tapo_train.tools.crop import ZoomTool
from tapo_train.tools.function_tool import tool
from tapo_train.tools.images import PNG_PIXELS, ImageDecoder, ResultPictures, image_from_bytes
from tapo_train.tools.ledger import Ledger
from tapo_train.tools.limits import ToolLimits
from tapo_train.tools.net import HttpClient
from tapo_train.tools.recording import Recording, Replay
from tapo_train.tools.sandbox import Sandbox
from tapo_train.tools.threads import num_abandoned
from tapo_train.tools.toolbox import Toolbox, close_tools
from tapo_train.types import Image, Observation, Outcome, Task

TASK = Task(id="t", question="?", images=(), answers=("a",))
CONTEXT = ToolContext(images=(), task=TASK)


class Words(BaseModel):
    """Arguments of `ask`."""

    word: str = ""
    number: int = 0


class Ask:
    """Answers once it is let; knows how often it was asked, and on which thread."""

    name = "ask"
    version = "1"
    description = "Ask."
    reads: frozenset[str] = frozenset()
    arguments_model: type[BaseModel] = Words

    def __init__(self, fails: Exception | None = None, *, name: str = "ask") -> None:
        self.name = name
        self.fails = fails
        self.asked: list[str] = []
        self.threads: set[str] = set()
        self.may_answer = threading.Event()
        self.cancelled = 0

    async def run(self, arguments: Words, context: ToolContext) -> Observation:
        self.asked.append(arguments.word)
        number = len(self.asked)
        self.threads.add(threading.current_thread().name)
        try:
            while not self.may_answer.is_set():
                await asyncio.sleep(0.001)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.fails is not None:
            raise self.fails
        return Observation(text=f"answer {number}")


def played(play: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(play(), 30))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


@pytest.mark.parametrize("mode", [None, "record", "replay_or_record"])
def test_equal_calls_at_the_same_time_are_made_and_paid_once(
    tmp_path: Path, mode: Literal["record", "replay_or_record"] | None
) -> None:
    ask, ledger = Ask(), Ledger()
    ledger.fill(Decimal(2))
    replay = None if mode is None else Replay(Recording(tmp_path), mode)
    box = Toolbox(
        [ask], deadline_s=20, limits={"ask": ToolLimits(price=1.0)}, ledger=ledger, replay=replay
    )

    async def play() -> list[Observation]:
        words = ["same"] * 8 + ["other"]
        requests = [box.read("ask", {"word": word}) for word in words]
        calls = asyncio.gather(*(box.execute(request, CONTEXT) for request in requests))
        await until(lambda: len(ask.asked) == 2 and sum(box.under_way().values()) == 9)
        await asyncio.sleep(0.1)
        ask.may_answer.set()
        return await calls

    seen = played(play)
    assert sorted(ask.asked) == ["other", "same"] and ledger.spent == 2
    assert len({answer.text for answer in seen[:8]}) == 1 and seen[8].text != seen[0].text
    assert Counter(answer.cached for answer in seen) == {True: 7, False: 2}
    records = ledger.drain()
    assert Counter((r.cached, r.cost) for r in records) == {(True, 0.0): 7, (False, 1.0): 2}
    box.close()


def test_a_call_after_an_equal_one_is_made_again() -> None:
    ask = Ask()
    ask.may_answer.set()
    box = Toolbox([ask], deadline_s=20)
    for number in (1, 2):
        seen = asyncio.run(box.execute(box.read("ask", {}), CONTEXT))
        assert (seen.text, seen.cached) == (f"answer {number}", False)


def test_calls_about_different_questions_are_not_equal_unless_the_tool_says_so() -> None:
    class Reader(Ask):
        reads = frozenset({"task"})

    async def play(ask: Ask) -> None:
        box = Toolbox([ask], deadline_s=20)
        contexts = [replace(CONTEXT, task=replace(TASK, id=str(n))) for n in range(3)]
        request = box.read("ask", {})
        calls = asyncio.gather(*(box.execute(request, context) for context in contexts))
        await until(lambda: sum(box.under_way().values()) == 3)
        await asyncio.sleep(0.1)
        ask.may_answer.set()
        await calls

    reader, blind = Reader(), Ask()
    played(lambda: play(reader))
    played(lambda: play(blind))
    assert (len(reader.asked), len(blind.asked)) == (3, 1)


def test_who_gives_up_does_not_end_the_call_of_the_others_and_the_last_one_does() -> None:
    ask = Ask()
    box = Toolbox([ask], deadline_s=20)

    async def play() -> Observation:
        request = box.read("ask", {})
        first, second = (asyncio.create_task(box.execute(request, CONTEXT)) for _ in range(2))
        await until(lambda: len(ask.asked) == 1 and box.under_way() == {"ask": 2})
        await asyncio.sleep(0.05)
        first.cancel()
        await asyncio.sleep(0.05)
        assert ask.cancelled == 0
        third = asyncio.create_task(box.execute(request, CONTEXT))
        await asyncio.sleep(0.05)
        second.cancel()
        third.cancel()
        await until(lambda: ask.cancelled == 1)
        anew = asyncio.create_task(box.execute(request, CONTEXT))
        await until(lambda: len(ask.asked) == 2)
        ask.may_answer.set()
        return await anew

    assert played(play).text == "answer 2"


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(ToolDownError("502"), Outcome.INFRA_ERROR), (KeyError("bug"), Outcome.INFRA_ERROR)],
)
def test_a_failure_is_that_of_all_who_wait_for_it(error: Exception, outcome: Outcome) -> None:
    ask = Ask(error)
    box = Toolbox([ask], deadline_s=20)

    async def play() -> list[Observation]:
        calls = asyncio.gather(*(box.execute(box.read("ask", {}), CONTEXT) for _ in range(3)))
        await until(lambda: box.under_way() == {"ask": 3})
        await asyncio.sleep(0.05)
        ask.may_answer.set()
        return await calls

    assert [seen.outcome for seen in played(play)] == [outcome] * 3 and len(ask.asked) == 1


def test_a_strict_replay_ends_all_who_wait_for_a_call_that_is_not_there(tmp_path: Path) -> None:
    box = Toolbox([Ask()], deadline_s=5, replay=Replay(Recording(tmp_path), "replay"))

    async def play() -> list[Any]:
        calls = (box.execute(box.read("ask", {}), CONTEXT) for _ in range(3))
        return await asyncio.gather(*calls, return_exceptions=True)

    assert [type(error) for error in played(play)] == [ReplayMissError] * 3


def test_tools_work_on_one_loop_of_their_own_whichever_loop_plays() -> None:
    ask = Ask()
    ask.may_answer.set()
    box = Toolbox([ask], deadline_s=5)
    for _ in range(2):
        asyncio.run(box.execute(box.read("ask", {}), CONTEXT))
    assert ask.threads == {"tools"}


def test_a_tool_answers_while_the_callers_loop_is_held_up() -> None:
    ask = Ask()
    ask.may_answer.set()
    box = Toolbox([ask], deadline_s=5)

    async def play() -> Observation:
        call = asyncio.create_task(box.execute(box.read("ask", {}), CONTEXT))
        await asyncio.sleep(0)  # it is on its way
        deadline = time.monotonic() + 10
        while not ask.asked and time.monotonic() < deadline:
            time.sleep(0.005)  # as an engine's step would
        return await call

    assert played(play).text == "answer 1" and ask.asked == [""]


# Queues and deadlines ---------------------------------------------------------------------------


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


class Blocking(Ask):
    """Blocks a thread until its gate opens."""

    def __init__(self, gate: threading.Event, name: str = "ask") -> None:
        super().__init__(name=name)
        self.gate = gate

    async def run(self, arguments: Words, context: ToolContext) -> Observation:
        def wait() -> None:
            self.asked.append(arguments.word)
            self.gate.wait()

        await asyncio.to_thread(wait)
        return Observation(text="done")


def calls_of(box: Toolbox, name: str, count: int) -> list[Coroutine[Any, Any, Observation]]:
    requests = [box.read(name, {"number": number}) for number in range(count)]
    return [box.execute(request, CONTEXT) for request in requests]


def test_a_tool_whose_threads_all_hang_starves_no_other_tool(gate: threading.Event) -> None:
    slow, quick = Blocking(gate, "slow"), Blocking(threading.Event(), "quick")
    quick.gate.set()
    box = Toolbox([slow, quick], deadline_s=20)

    async def play() -> list[Observation]:
        hanging = [asyncio.create_task(call) for call in calls_of(box, "slow", 128)]
        await until(lambda: len(slow.asked) == 64)
        seen = await asyncio.gather(*calls_of(box, "quick", 16))
        assert len(slow.asked) == 64
        gate.set()
        await asyncio.gather(*hanging)
        return seen

    assert [answer.outcome for answer in played(play)] == [Outcome.OK] * 16


def test_a_tool_that_computes_has_as_many_threads_as_it_says(gate: threading.Event) -> None:
    computing = Blocking(gate)
    computing.max_threads = 2  # type: ignore[attr-defined]
    box = Toolbox([computing], deadline_s=20)

    async def play() -> list[Observation]:
        calls = [asyncio.create_task(call) for call in calls_of(box, "ask", 5)]
        await until(lambda: len(computing.asked) == 2)
        await asyncio.sleep(0.1)
        assert len(computing.asked) == 2
        gate.set()
        return await asyncio.gather(*calls)

    assert [answer.outcome for answer in played(play)] == [Outcome.OK] * 5


def test_waiting_for_a_thread_is_not_held_against_the_deadline(gate: threading.Event) -> None:
    gate_of_call = threading.Event()
    gate_of_call.set()
    box = Toolbox([Blocking(gate_of_call)], deadline_s=1.5)
    busy = [box._policies["ask"].threads.submit(gate.wait) for _ in range(64)]

    async def play() -> Observation:
        call = asyncio.create_task(calls_of(box, "ask", 1)[0])
        await asyncio.sleep(2.0)
        assert not call.done()
        gate.set()
        return await call

    assert played(play).text == "done" and all(work.result() for work in busy)
    (record,) = box.ledger.drain()
    assert record.queue_s > 1.9 and record.latency_s < 1.5


@pytest.mark.parametrize(
    "limits", [ToolLimits(concurrency=1, queue_s=0.2), ToolLimits(queue_s=0.2)]
)
def test_a_queue_has_a_deadline_of_its_own(gate: threading.Event, limits: ToolLimits) -> None:
    box = Toolbox([Blocking(gate)], deadline_s=30, limits={"ask": limits})
    count = 2 if limits.concurrency else 65

    async def play() -> list[Observation]:
        calls = [asyncio.create_task(call) for call in calls_of(box, "ask", count)]
        done, rest = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        gate.set()
        return [call.result() for call in done] + await asyncio.gather(*rest)

    first, *others = played(play)
    assert first.outcome is Outcome.TIMEOUT
    assert "waited for 0.2 s for its turn" in first.text
    assert [answer.outcome for answer in others] == [Outcome.OK] * (count - 1)


def test_a_deadline_ends_the_work_of_a_call_that_hangs_in_its_thread(gate: threading.Event) -> None:
    before = num_abandoned()
    box = Toolbox([Blocking(gate)], deadline_s=0.1)
    seen = asyncio.run(box.execute(box.read("ask", {}), CONTEXT))
    assert seen.outcome is Outcome.TIMEOUT and num_abandoned() == before + 1


def test_a_place_in_a_sandbox_is_waited_for_in_a_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox = Sandbox(workers=1)
    picture = draw_image(64, 64).data

    class Opener(Ask):
        async def run(self, arguments: Words, context: ToolContext) -> Observation:
            await asyncio.to_thread(sandbox.picture, picture, longest_px=32)
            return Observation(text="opened")

    box = Toolbox([Opener()], deadline_s=60)
    assert sandbox._seats.acquire()

    async def play() -> Observation:
        call = asyncio.create_task(box.execute(box.read("ask", {}), CONTEXT))
        await asyncio.sleep(0.3)
        sandbox._seats.release()
        return await call

    assert played(play).outcome is Outcome.OK
    (record,) = box.ledger.drain()
    assert record.queue_s > 0.2
    sandbox.close()


def test_tools_that_share_a_sandbox_close_it_side_by_side() -> None:
    """Eight at once, many times: each would hold some of the places and wait for the others'."""
    sandbox = Sandbox(workers=4)

    class Sharing(Ask):
        def close(self) -> None:
            for _ in range(200):
                sandbox.close()

    started = time.perf_counter()
    close_tools([Sharing(name=str(n)) for n in range(8)], within_s=15)
    assert time.perf_counter() - started < 15


# Retry-After -----------------------------------------------------------------------------------


@pytest.mark.parametrize("said", ["1", "date"])
def test_a_server_that_says_when_to_come_again_is_asked_then(said: str) -> None:
    from email.utils import formatdate

    when = said if said == "1" else formatdate(time.time() + 2, usegmt=True)
    times: list[float] = []
    answers = saying(response(b"slow", status=429, Retry_After=when), response(b"ok"))

    async def use(client: HttpClient, loopback: Any) -> Observation:
        class Fetch(Ask):
            async def run(self, arguments: Words, context: ToolContext) -> Observation:
                times.append(time.monotonic())
                return Observation(text=(await client.get("http://site.test/")).data.decode())

        box = Toolbox([Fetch()], deadline_s=20, limits={"ask": ToolLimits(retries=2)})
        return await box.execute(box.read("ask", {}), CONTEXT)

    seen = fetching(answers, use, resolve={"site.test": "93.184.215.14"})
    assert seen.text == "ok" and len(times) == 2 and times[1] - times[0] >= 0.95


def test_one_that_wants_to_be_asked_after_the_deadline_is_not_asked_again() -> None:
    class Busy(Ask):
        async def run(self, arguments: Words, context: ToolContext) -> Observation:
            self.asked.append("")
            raise ToolDownError("HTTP 429", retry_after_s=600)

    busy = Busy()
    box = Toolbox([busy], deadline_s=20, limits={"ask": ToolLimits(retries=5)})
    started = time.perf_counter()
    seen = asyncio.run(box.execute(box.read("ask", {}), CONTEXT))
    assert seen.outcome is Outcome.INFRA_ERROR and len(busy.asked) == 1
    assert time.perf_counter() - started < 10


# Numbers ---------------------------------------------------------------------------------------


@tool(version="1")
def page(number: int, part: list[int] | None = None) -> str:
    """Show a page.

    Args:
        number: of the page
        part: lines
    """
    return f"{number!r} {part!r}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"number": 3.0}, "3 None"),
        ({"number": 3, "part": [1.0, 2]}, "3 [1, 2]"),
        ({"number": -0.0}, "0 None"),
        ({"number": 3.5}, "valid integer"),
        ({"number": 1e300}, "valid integer"),
        ({"number": True}, "valid integer"),
        ({"number": "3"}, "valid integer"),
    ],
)
def test_an_integer_may_be_written_with_a_point(arguments: dict[str, Any], said: str) -> None:
    box = Toolbox([page], deadline_s=5)
    assert said in asyncio.run(box.execute(box.read("page", arguments), CONTEXT)).text


# Pictures --------------------------------------------------------------------------------------


class Shows(Ask):
    """Answers with the pictures it was given."""

    def __init__(self, *images: Image) -> None:
        super().__init__()
        self.images = images

    async def run(self, arguments: Words, context: ToolContext) -> Observation:
        return Observation(text="see", images=self.images)


def shown(*images: Image, max_pixels: int | None = None) -> Observation:
    pictures = ResultPictures(decoder=ImageDecoder(), max_pixels=max_pixels)
    box = Toolbox([Shows(*images)], deadline_s=20, pictures=pictures)
    return asyncio.run(box.execute(box.read("ask", {}), CONTEXT))


def jpeg(width: int, height: int) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Pillow.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


GOOD = draw_image(50, 40)
BAD = {
    "truncated": image_from_bytes(jpeg(200, 100)[:3000], width=200, height=100),
    "no picture": image_from_bytes(b"hello", width=1, height=1),
    "another size": replace(GOOD, width=41),
    "another digest": replace(GOOD, sha256="0" * 64),
    "huge": image_from_bytes(
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\1\0\0\0\1\0\0\x08\2\0\0\0" + b"\0" * 20, width=65536,
        height=65536,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_picture_that_would_end_the_run_later_fails_inside_its_call(kind: str) -> None:
    seen = shown(GOOD, BAD[kind])
    assert seen.outcome is Outcome.INFRA_ERROR and seen.images == ()
    assert "picture" in seen.text


def test_pictures_within_the_cap_are_taken_as_they_are() -> None:
    assert shown(GOOD, GOOD, max_pixels=4000).images == (GOOD, GOOD)


def test_pictures_beyond_the_cap_are_reduced_to_equal_shares_of_it() -> None:
    small, large = draw_image(30, 20), draw_image(300, 200)
    kept, reduced = shown(small, large, max_pixels=12_000).images
    assert kept == small
    assert (reduced.width, reduced.height) == (94, 63)  # sqrt(6000 / 60000) of each side
    assert reduced.ref == large.ref and reduced.sha256 != large.sha256


def test_a_zoom_into_a_noisy_large_picture_is_a_jpeg_of_at_most_the_cap() -> None:
    data = jpeg(2000, 1500)
    image = image_from_bytes(data, width=2000, height=1500)
    box = Toolbox([ZoomTool(ImageDecoder(), max_pixels=1_000_000)], deadline_s=60)
    request = box.read("image_zoom_in_tool", {"bbox_2d": [0, 0, 1000, 1000]})
    (whole,) = asyncio.run(box.execute(request, ToolContext(images=(image,), task=TASK))).images
    assert (whole.width, whole.height) == (1154, 866)
    assert whole.data.startswith(b"\xff\xd8") and whole.ref.box == (0.0, 0.0, 1.0, 1.0)
    request = box.read("image_zoom_in_tool", {"bbox_2d": [0, 0, 400, 400]})
    (part,) = asyncio.run(box.execute(request, ToolContext(images=(image,), task=TASK))).images
    assert (part.width, part.height) == (800, 600) and PNG_PIXELS > 800 * 600
    assert part.data.startswith(b"\x89PNG"), "small ones are kept exactly"
