"""Measure C1 with real sockets: what an engine that holds its thread costs the tools beside it.

    python scripts/bench_sockets.py [--step-ms 20 50] [--kilobytes 20 4096] [--out FILE]

The agent loop, the driver, the toolbox, the HTTP client and the search tool are the real ones. The
engine's step waits (as for a GPU) and then gives every request one token; the search is a server in
a process of its own that answers after 50 ms. Turns have 10 to 30 tokens.

latency     of a call during the rollout (median), beside that of the same call alone
efficiency  lower bound / makespan; lower bound: the longest trajectory, its steps and as many
            calls alone, each until the end of the step in which its answer comes: an engine that
            others keep busy takes a request up between two steps, which no loop can change. The
            peer's value is the efficiency against the same bound without that wait.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from bench_rollout import chat
from measures import RESULTS, Measure, append, load, versions
from timed_engine import TimedEngine

from tapo_train.rollout.collect import collect
from tapo_train.rollout.engine import Completion, GenerationRequest, Sampling
from tapo_train.rollout.limits import Limits
from tapo_train.tools.addresses import AllowedHosts
from tapo_train.tools.base import ToolContext
from tapo_train.tools.contamination import Contamination
from tapo_train.tools.net import HttpClient
from tapo_train.tools.remote_search import RemoteTextSearch
from tapo_train.tools.sandbox import Sandbox
from tapo_train.tools.toolbox import Toolbox
from tapo_train.types import Task

CALLS = 4
SERVER = """
import asyncio, json, sys
body = json.dumps({"results": [{"title": "T", "text": "word " * (int(sys.argv[1]) // 5)}]}).encode()
head = b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body)
async def handle(reader, writer):
    try:
        while True:
            asked = await reader.readuntil(b"\\r\\n\\r\\n")
            length = int(asked.lower().split(b"content-length:")[1].split(b"\\r\\n")[0])
            await reader.readexactly(length)
            await asyncio.sleep(0.05)
            writer.write(head + body)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()
async def main():
    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


class SteppedEngine(TimedEngine):
    """Every step takes as long, and gives each request one of its tokens."""

    def __init__(self, reply: Any, step_s: float) -> None:
        super().__init__(reply)
        self._step_s = step_s
        self._left: dict[str, int] = {}

    def submit(self, request: GenerationRequest) -> None:
        tokens, steps = self._reply(request)
        self._open[request.id] = tokens
        self._left[request.id] = int(steps)

    def step(self) -> list[Completion]:
        time.sleep(self._step_s)
        self._left = {id: left - 1 for id, left in self._left.items() if id in self._open}
        done = [id for id, left in self._left.items() if left <= 0]
        return [self._completion(id) for id in done]

    def idle_s(self) -> float:
        return 0.0

    def _completion(self, id: str) -> Completion:
        tokens = self._open.pop(id)
        logprobs = np.full(len(tokens), -1.0, dtype=np.float32)
        return Completion(id=id, tokens=tokens, logprobs=logprobs, finished="stop")


@contextmanager
def serving(size: int) -> Iterator[int]:
    """The port of a server whose answers have about so many bytes."""
    command = [sys.executable, "-c", SERVER, str(size)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield int(server.stdout.readline())
        finally:
            server.kill()


def toolbox(port: int) -> Toolbox:
    """A search that asks the server."""
    client = HttpClient(allowed=AllowedHosts.parse([f"127.0.0.1:{port}"]))
    search = RemoteTextSearch(
        f"http://127.0.0.1:{port}/s", client, Sandbox(), Contamination(), max_chars=200
    )
    return Toolbox([search], deadline_s=60.0)


def alone_s(box: Toolbox) -> float:
    """[s] of a call with nothing beside it."""
    task = Task(id="q", question="?", images=(), answers=("a",))

    async def calls() -> list[float]:
        took = []
        for number in range(9):
            request = box.read("text_search_tool", {"query": str(number)})
            seen = await box.execute(request, ToolContext(images=(), task=task))
            took.append(seen.latency_s)
        return took

    return statistics.median(asyncio.run(calls()))


def play(box: Toolbox, count: int, step_s: float) -> tuple[float, float, list[list[int]]]:
    """Makespan [s], median latency of a call [s], and the steps of every turn."""
    steps = np.random.default_rng(0).integers(10, 31, (count, CALLS + 1)).tolist()
    format = chat()

    def reply(request: GenerationRequest) -> tuple[Any, float]:
        name, _, turn = request.id.rpartition(":")
        rollout = int(name.rpartition(".")[2])
        call = {"name": "text_search_tool", "arguments": {"query": f"{rollout} {turn}"}}
        is_last = int(turn) == CALLS
        text = "<answer>x</answer>" if is_last else f"<tool_call>{json.dumps(call)}</tool_call>"
        return format.assistant(text), steps[rollout][int(turn)]

    started = time.perf_counter()
    (group,) = collect(
        [Task(id="q", question="Who?", images=(), answers=("a",))],
        engine=SteppedEngine(reply, step_s),
        chat=format,
        toolbox=box,
        system_prompt="Answer.",
        rollouts_per_task=count,
        limits=Limits(max_turns=CALLS + 1, max_turn_tokens=200, max_tokens=8000),
        sampling=Sampling(),
        max_in_flight=count,
    )
    makespan = time.perf_counter() - started
    calls = [c for t in group.trajectories for turn in t.turns for c in turn.calls]
    answered = [c.observation for c in calls if c.observation is not None]
    if len(answered) != count * CALLS or any(str(a.outcome) != "ok" for a in answered):
        raise SystemExit(f"{len(answered)} of {count * CALLS} calls were answered")
    return makespan, statistics.median(a.latency_s for a in answered), steps


def measure(step_s: float, size: int, count: int) -> list[Measure]:
    """Best of three, as other programs on the machine only ever add."""
    id = f"C1.sockets.{size // 1024}kB.{step_s * 1000:.0f}ms"
    with serving(size) as port:
        box = toolbox(port)
        alone = alone_s(box)
        runs = [play(box, count, step_s) for _ in range(3)]
        alone = min(alone, alone_s(box))
        box.close()
    longest, makespan = max(map(sum, runs[0][2])), min(run[0] for run in runs)
    found = (longest + CALLS * math.ceil(alone / step_s)) * step_s / makespan
    unaligned = (longest * step_s + CALLS * alone) / makespan
    latency = min(latency for _, latency, _ in runs)
    common: dict[str, Any] = {"versions": versions("httpx"), "load": load()}
    return [
        Measure(
            id=id, value=round(found, 3), unit="of the lower bound", peer="an engine of no steps",
            peer_value=round(unaligned, 3), target=">= 0.95", met=found >= 0.95, **common,
        ),
        Measure(
            id=f"{id}.latency", value=round(latency, 4), unit="s", peer="the same call alone",
            peer_value=round(alone, 4), ratio=round(alone / latency, 3), target="ratio >= 0.8",
            met=alone / latency >= 0.8, **common,
        ),
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step-ms", nargs="+", type=float, default=[20.0, 50.0])
    parser.add_argument("--kilobytes", nargs="+", type=int, default=[20, 4096])
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    for step_ms in arguments.step_ms:
        for kilobytes in arguments.kilobytes:
            count = 128 if kilobytes < 1000 else 16
            append(measure(step_ms / 1000, kilobytes * 1024, count), arguments.out)


if __name__ == "__main__":
    main()
