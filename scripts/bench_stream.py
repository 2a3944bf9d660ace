"""Measure what an update waits for: a stream of rollouts beside taking turns.

    python scripts/bench_stream.py [--updates 6] [--out FILE]

Stream, driver, agent loop and toolbox are the real ones. The engine is a number of slots that write
a turn in a known time each; the learner sleeps; a call takes 0.5 s with a log-normal tail (sigma
0.5). So the rollout work of an update is known (all its turns / slots), as is its own.

time per update   after the first ones, until what the last one learned is handed over
bound             the larger of rollout work and update work: nothing waits for anything; on the
                  same device their sum, as the two take turns there
synchronous       max_staleness=0 on devices of their own: the sum, and the slow tail
"""

from __future__ import annotations

import argparse
import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bench_rollout import Wait, chat
from measures import RESULTS, Measure, append, load, versions
from timed_engine import Reply, TimedEngine

from tapo_train.data.sampler import TaskSampler
from tapo_train.rollout.driver import EngineDriver
from tapo_train.rollout.engine import GenerationRequest, Sampling
from tapo_train.rollout.group import Rules
from tapo_train.rollout.limits import Limits
from tapo_train.rollout.seats import Seats
from tapo_train.rollout.stream import GroupStream
from tapo_train.tools.toolbox import Toolbox
from tapo_train.training.interruption import Interruption
from tapo_train.training.stream import Stream
from tapo_train.types import Task

QUESTIONS, ROLLOUTS, CALLS = 8, 4, 3
SLOTS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Works that are known, and what is measured of them."""

    name: str
    """Which of the two takes longer."""
    rollout_s: float
    update_s: float
    ways: tuple[tuple[int, bool, float], ...]
    """(max_staleness, whether the engine has devices of its own, most times the bound)"""


CASES = (
    Case(name="learner", rollout_s=4.5, update_s=6.0, ways=((1, True, 1.05), (1, False, 1.15))),
    # With S = 1 a batch has one update's time for its slowest trajectory, which shows here.
    Case(name="engine", rollout_s=6.0, update_s=4.5, ways=((1, True, 1.1), (2, True, 1.05))),
)


class SlottedEngine(TimedEngine):
    """Writes so many turns at a time, first come, first served."""

    def __init__(self, reply: Reply, slots: int) -> None:
        super().__init__(reply)
        self._free = [0.0] * slots

    def submit(self, request: GenerationRequest) -> None:
        """See `Engine.submit`."""
        tokens, seconds = self._reply(request)
        begins = max(time.perf_counter(), heapq.heappop(self._free))
        heapq.heappush(self._free, begins + seconds)
        self._open[request.id] = tokens
        heapq.heappush(self._due, (begins + seconds, request.id))


def stream(turn_s: float, *, staleness: int, apart: bool) -> Stream:
    """A stream whose turns take `turn_s` of a slot each."""
    tail = np.random.default_rng(0)
    format = chat()
    last = format.assistant("<answer>Velor</answer>")

    def reply(request: GenerationRequest) -> tuple[Any, float]:
        name, _, turn = request.id.rpartition(":")
        if int(turn) == CALLS:
            return last, turn_s
        # Equal calls at a time would be made once.
        query = f'{{"name": "search", "arguments": {{"query": "{name} {turn}"}}}}'
        return format.assistant(f"<tool_call>{query}</tool_call>"), turn_s

    tool = Wait(text="Velor", latency=lambda _: 0.5 * tail.lognormal(0, 0.5))
    engine = SlottedEngine(reply, SLOTS)
    rules = Rules(
        chat=format,
        toolbox=Toolbox([tool], deadline_s=60.0),
        system_prompt="Answer.",
        rollouts=ROLLOUTS,
        limits=Limits(max_turns=CALLS + 1, max_turn_tokens=200, max_tokens=4000),
        sampling=Sampling(),
    )
    driver = EngineDriver(engine, end_token_id=format.end_token_id)
    if apart:
        driver.start()
    tasks = [Task(id=str(n), question="Who?", images=(), answers=("a",)) for n in range(999)]
    return Stream(
        tasks,
        TaskSampler([task.id for task in tasks], seed=0),
        GroupStream(rules, driver, seats=Seats(engine=engine)),
        Interruption(),
        per_step=QUESTIONS,
        max_staleness=staleness,
        active=None,
        steps=999,
    )


def seconds_per_update(rounds: Stream, update_s: float, updates: int, *, skipped: int) -> float:
    """[s] After those at the beginning, when what was begun together becomes complete together."""
    ends = []
    for step in range(skipped + updates):
        rounds(step)
        time.sleep(update_s)
        ends.append(time.perf_counter())
    rounds.close()
    return (ends[-1] - ends[skipped - 1]) / updates


def measure(case: Case, updates: int) -> list[Measure]:
    """The case's ways to take, beside taking turns."""
    turn_s = case.rollout_s * SLOTS / (QUESTIONS * ROLLOUTS * (CALLS + 1))
    taken = partial(seconds_per_update, update_s=case.update_s, updates=updates)
    synchronous = taken(stream(turn_s, staleness=0, apart=True), skipped=1)
    found = []
    for staleness, apart, most in case.ways:
        skipped = 2 * (staleness + 1)
        value = taken(stream(turn_s, staleness=staleness, apart=apart), skipped=skipped)
        works = (case.rollout_s, case.update_s)
        bound = max(works) if apart else sum(works)
        place = "apart" if apart else "same_device"
        found.append(
            Measure(
                id=f"stream.{case.name}.{place}.S{staleness}", value=round(value, 2),
                unit="s per update", peer="synchronous", peer_value=round(synchronous, 2),
                ratio=round(synchronous / value, 3), met=value <= most * bound,
                target=f"<= {most} x {bound:g} s of work; found {value / bound:.3f} x",
                versions=versions("numpy"), load=load(),
            )
        )  # fmt: skip
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure a learner that takes longer, then an engine that does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    chat()  # loads
    for case in CASES:
        append(measure(case, arguments.updates), arguments.out)


if __name__ == "__main__":
    main()
