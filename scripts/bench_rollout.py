"""Measures C1, C2, C3, C7 and C10: what the rollout costs beside the model and the tools.

    python scripts/bench_rollout.py [--only C1 C2] [--out FILE]

The agent loop, the chat format, the toolbox and the driver are the real ones; the engine and the
tool do nothing but take time (C1) or answer at once (C2). A turn is think + call, an observation
is text, the last turn answers.

C1 efficiency = lower bound / makespan. Lower bound with generation times g, tool times L and at
most K calls at a time: max( longest trajectory, all tool time / K ), the longest trajectory being
max_i sum_t (g_it + L_it).
C2 CPU time of this process per turn. Peer figures are those of verl 0.9.1's ToolAgentLoop,
measured with the same shapes on a machine of the same kind (2 shared cores).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from measures import RESULTS, Measure, append, load, versions
from pydantic import BaseModel
from timed_engine import TimedEngine

from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.collect import collect
from tapo_train.rollout.engine import GenerationRequest, Sampling
from tapo_train.rollout.limits import Limits
from tapo_train.tools.base import ToolContext
from tapo_train.tools.toolbox import Toolbox
from tapo_train.types import Group, Observation, Task

MODEL = Path(__file__).resolve().parent.parent / "assets" / "warm_start"
WORDS = ["house", "tower", "Velor", "river", "green", "gate", "built", "by", "the", "old", "mill"]
VERL_MS = {"short": 1.2, "long": 2.35}
"""verl 0.9.1, CPU ms per turn: 256 x 4 turns with 6-word observations, 16 x 32 with 800 tokens."""


class Nothing(BaseModel):
    """No arguments but a word."""

    query: str = ""


@dataclass
class Wait:
    """A tool that answers `text` after the next of `latencies`, at most `limit` calls at a time."""

    text: str
    latency: Callable[[str], float]
    limit: asyncio.Semaphore | None = None
    calls: int = 0
    name: str = "search"
    version: str = "1"
    description: str = "Search."
    arguments_model: type[BaseModel] = Nothing

    async def run(self, arguments: Any, context: ToolContext) -> Observation:
        """Wait, then answer."""
        self.calls += 1
        seconds = self.latency(arguments.query)
        if self.limit is None:
            await asyncio.sleep(seconds)
        else:
            async with self.limit:
                await asyncio.sleep(seconds)
        return Observation(text=self.text)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long each generation and each call of each trajectory takes [s]."""

    generation: list[list[float]]
    tool: list[list[float]]
    """One shorter than `generation`: the last turn answers."""
    limit: int | None = None

    @property
    def lower_bound(self) -> float:
        """[s]"""
        longest = max(sum(g) + sum(t) for g, t in zip(self.generation, self.tool, strict=True))
        in_line = sum(map(sum, self.tool)) / self.limit if self.limit else 0.0
        return max(longest, in_line)

    @property
    def turns(self) -> int:
        """Of all trajectories."""
        return sum(map(len, self.generation))


def constant(count: int, calls: int, *, limit: int | None = None) -> Plan:
    """Every trajectory alike: 0.1 s to write a turn, 0.2 s for a call."""
    return Plan(generation=[[0.1] * (calls + 1)] * count, tool=[[0.2] * calls] * count, limit=limit)


def lognormal(count: int) -> Plan:
    """1 to 8 calls, times log-normal with sigma 0.8 around medians of 0.1 and 0.2 s."""
    rng = np.random.default_rng(0)
    calls = rng.integers(1, 9, count)
    return Plan(
        generation=[(0.1 * rng.lognormal(0, 0.8, n + 1)).tolist() for n in calls],
        tool=[(0.2 * rng.lognormal(0, 0.8, n)).tolist() for n in calls],
    )


@cache
def chat() -> ChatFormat:
    """Of the demo's policy."""
    return ChatFormat(MODEL)


def text_of(tokens: int) -> str:
    """A text of about so many tokens of the demo's tokenizer."""
    rng = np.random.default_rng(1)
    words: list[str] = []
    while len(chat().plain(" ".join(words))) < tokens:
        words += rng.choice(WORDS, size=max(1, tokens // 8)).tolist()
    return " ".join(words)


def place(request: GenerationRequest) -> tuple[int, int]:
    """(trajectory, turn) of a request: ids are task/version.occurrence.rollout:turn."""
    name, _, turn = request.id.rpartition(":")
    return int(name.rpartition(".")[2]), int(turn)


def play(plan: Plan, observation: str) -> tuple[list[Group], float, float]:
    """The groups, the makespan [s] and the CPU time [s]."""
    format = chat()
    thought = "<think>" + " ".join(WORDS[:6]) + "</think>"
    last = format.assistant(f"{thought}<answer>Velor</answer>")

    @cache
    def call(rollout: int, turn: int) -> Any:
        query = f'{{"name": "search", "arguments": {{"query": "{rollout} {turn}"}}}}'
        return format.assistant(f"{thought}<tool_call>{query}</tool_call>")

    def reply(request: GenerationRequest) -> tuple[Any, float]:
        rollout, turn = place(request)
        seconds = plan.generation[rollout][turn]
        return (last if turn == len(plan.tool[rollout]) else call(rollout, turn)), seconds

    def latency(query: str) -> float:
        rollout, turn = map(int, query.split())
        return plan.tool[rollout][turn]

    for rollout, calls in enumerate(plan.tool):
        for turn in range(len(calls)):
            call(rollout, turn)
    tool = Wait(text=observation, latency=latency)
    if plan.limit is not None:
        tool.limit = asyncio.Semaphore(plan.limit)
    longest = max(map(len, plan.tool))
    room = 400 + (longest + 1) * (60 + len(format.plain(observation)))
    task = Task(id="q", question="Who built the tower?", images=(), answers=("Velor",))
    wall, cpu = time.perf_counter(), time.process_time()
    groups = collect(
        [task],
        engine=TimedEngine(reply),
        chat=format,
        toolbox=Toolbox([tool], deadline_s=300.0),
        system_prompt="Answer the question.",
        rollouts_per_task=len(plan.tool),
        limits=Limits(max_turns=longest + 1, max_turn_tokens=200, max_tokens=room),
        sampling=Sampling(),
        max_in_flight=len(plan.tool),
    )
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    if tool.calls != sum(map(len, plan.tool)):
        raise SystemExit(f"{tool.calls} calls were run; planned {sum(map(len, plan.tool))}")
    return groups, wall, cpu


def efficiency(id: str, plan: Plan, target: float, observation: str) -> Measure:
    """C1: the best of five runs, and of as many of the bare event loop between them.

    Other programs on the machine only ever add to a makespan.
    """
    runs = [(play(plan, observation)[1], asyncio.run(bare(plan))) for _ in range(5)]
    found, floor = (plan.lower_bound / min(walls) for walls in zip(*runs, strict=True))
    return _measure(
        f"C1.{id}",
        found,
        "of the lower bound",
        target=f">= {target}",
        met=found >= target,
        peer="asyncio.sleep alone, one task per trajectory",
        peer_value=round(floor, 4),
        ratio=round(found / floor, 4),
    )


async def bare(plan: Plan) -> float:
    """Makespan [s] of the plan when a turn and a call are nothing but sleep."""
    limit = asyncio.Semaphore(plan.limit or len(plan.tool))

    async def trajectory(generation: list[float], tool: list[float]) -> None:
        for write, call in zip(generation, [*tool, 0.0], strict=True):
            await asyncio.sleep(write)
            async with limit:
                await asyncio.sleep(call)

    started = time.perf_counter()
    pairs = zip(plan.generation, plan.tool, strict=True)
    await asyncio.gather(*(trajectory(generation, tool) for generation, tool in pairs))
    return time.perf_counter() - started


def orchestration() -> list[Measure]:
    """C2: CPU per turn with short and long observations, and its growth with the turns."""
    short = _cpu_ms(Plan(generation=[[0.0] * 5] * 256, tool=[[0.0] * 4] * 256), text_of(12))
    text = text_of(800)
    turns = (4, 8, 16, 32, 64)
    long = {
        n: _cpu_ms(Plan(generation=[[0.0] * (n + 1)] * 16, tool=[[0.0] * n] * 16), text)
        for n in turns
    }
    total = [n * long[n] for n in turns]
    slope = float(np.polyfit(np.log(turns), np.log(total), 1)[0])
    print("CPU ms per turn with 800 tokens:", {n: round(ms, 3) for n, ms in long.items()})
    return [
        _against_verl("C2.short", short, VERL_MS["short"], 0.25),
        _against_verl("C2.long", long[32], VERL_MS["long"], 1.0),
        _measure("C2.slope", slope, "log-log, turns 4 to 64", target="<= 1.05", met=slope <= 1.05),
    ]


def _cpu_ms(plan: Plan, observation: str) -> float:
    """Per tool turn, the least of five runs: what a busy machine adds is not ours."""
    turns = sum(map(len, plan.tool))
    return min(play(plan, observation)[2] for _ in range(5)) / turns * 1e3


def _against_verl(id: str, found: float, peer: float, target: float) -> Measure:
    return _measure(
        id,
        found,
        "CPU ms per turn",
        target=f"<= {target}, ratio >= 2.3",
        met=found <= target and peer / found >= 2.3,
        peer="verl 0.9.1, published figure of the same shape, not measured in this run",
        peer_value=peer,
        ratio=round(peer / found, 2),
    )


def kept_and_stored() -> list[Measure]:
    """C3: sampled tokens kept; C10: bytes a finished trajectory holds, pictures and task aside."""
    plan = Plan(generation=[[0.0] * 9] * 16, tool=[[0.0] * 8] * 16)
    (group,), _, _ = play(plan, text_of(800))
    same = total = 0
    for trajectory in group.trajectories:
        for turn in trajectory.turns:
            sampled = trajectory.tokens[turn.span.start : turn.span.end]
            expected = chat().assistant(turn.text)
            total += len(expected)
            same += int((sampled == expected).sum()) if len(sampled) == len(expected) else 0
    tokens = sum(len(t.tokens) for t in group.trajectories)
    stored = sum(held_bytes(t, skip=(t.task,)) for t in group.trajectories) / tokens
    return [
        _measure("C3.kept", same / total, "of sampled tokens", target="= 1", met=same == total),
        _measure("C10", stored, "bytes per token", target="<= 16", met=stored <= 16),
    ]


def held_bytes(value: Any, *, skip: Sequence[Any] = ()) -> int:
    """Bytes of everything reachable from `value`, each object once."""
    seen = {id(item) for item in skip}
    todo, total = [value], 0
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, type):
            continue
        seen.add(id(item))
        total += sys.getsizeof(item)
        if isinstance(item, dict):
            todo += [*item.keys(), *item.values()]
        elif isinstance(item, tuple | list):
            todo += item
        elif hasattr(item, "__slots__") and not isinstance(item, str | bytes | np.ndarray):
            todo += [getattr(item, name) for name in item.__slots__ if hasattr(item, name)]
    return total


def _measure(id: str, value: float, unit: str, *, target: str, met: bool, **peer: Any) -> Measure:
    return Measure(
        id=id,
        value=round(value, 4),
        unit=unit,
        target=target,
        met=met,
        versions=versions("numpy", "transformers", "tokenizers"),
        load=load(),
        **peer,
    )


def makespans() -> list[Measure]:
    """C1 in four shapes."""
    short = text_of(12)
    return [
        efficiency("64x4", constant(64, 4), 0.95, short),
        efficiency("64xlognormal", lognormal(64), 0.98, short),
        efficiency("256x4", constant(256, 4), 0.90, short),
        efficiency("64x4.cap8", constant(64, 4, limit=8), 0.95, short),
    ]


BENCHES = {"C1": makespans, "C2": orchestration, "C3": kept_and_stored}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=list(BENCHES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    for name in arguments.only:
        append(BENCHES[name](), arguments.out)


if __name__ == "__main__":
    main()
