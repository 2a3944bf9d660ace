"""Whole runs over servers, in a stream: killed in every way, on two ranks, on two machines."""

from __future__ import annotations

import json
import subprocess
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import torch
from fake_vllm import SECRET, FakeServer, serving, wait_until
from forked_runs import PATIENCE_S, ForkedRun
from process_environment import ROOT, environment, free_port
from safetensors.torch import load_file
from whole_runs import command, digest_of_weights, mixed_for, read_rows

from tapo_train.build.questions import build_order
from tapo_train.recipe.compose import load_recipe
from tapo_train.rollout.chat import ChatFormat

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

CALL = '<tool_call>{"name": "text_search_tool", "arguments": {"query": "Velor"}}</tool_call>'
PER_STEP, ROLLOUTS = 4, 2


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat(ROOT / "assets" / "warm_start")


def searches_once(id: str) -> str:
    return CALL if id.endswith(":0") else "<answer>x</answer>"


def takes_its_time(id: str) -> str:
    """One question of four takes longer than the others' update."""
    if zlib.crc32(id.partition("/")[0].encode()) % 4 == 0:
        time.sleep(0.4)
    return searches_once(id)


class OneLate:
    """A script that keeps one question, after its first turn, until it is as old as it may become.

    Args:
        last: update of the run.
    """

    def __init__(self, *, staleness: int, last: int) -> None:
        self._staleness, self._last = staleness, last
        self._guard = Lock()
        self._kept = ("", "")
        """The start of the trainer and the question."""
        self.server: FakeServer | None = None

    def __call__(self, id: str) -> str:
        question, _, trajectory = id.rpartition("/")
        began = int(trajectory.partition(".")[0])
        trainer, version = self._present()
        if id.endswith(":1") and version == began and self._keeps(trainer, question):
            until = min(began + self._staleness, self._last)
            wait_until(lambda: self._present()[1] >= until, most_s=PATIENCE_S)
            self._let_go(trainer, question)
        return searches_once(id)

    @contextmanager
    def serving(self, chat: ChatFormat) -> Iterator[FakeServer]:
        with serving(chat, self) as self.server:
            yield self.server

    def _present(self) -> tuple[str, int]:
        """Start of the trainer and version of the weights; -1 while they are replaced."""
        assert self.server is not None
        trainer, _, version = self.server.label.rpartition(".")
        return trainer, int(version) if version.isdecimal() else -1

    def _keeps(self, trainer: str, question: str) -> bool:
        """Whether this is the one; what a trainer asked that was killed keeps nobody."""
        with self._guard:
            if self._kept[0] != trainer or not self._kept[1]:
                self._kept = trainer, question
            return self._kept == (trainer, question)

    def _let_go(self, trainer: str, question: str) -> None:
        with self._guard:
            if self._kept == (trainer, question):
                self._kept = trainer, ""


class Holding:
    """A script that writes so many turns; then its server keeps everybody waiting."""

    def __init__(self, turns: int) -> None:
        self.left, self.written = turns, set[str]()
        self.server: FakeServer | None = None

    def __call__(self, id: str) -> str:
        self.written.add(id)
        self.left -= 1
        if self.left == 0 and self.server is not None:
            self.server.answers.clear()
        return takes_its_time(id)

    @contextmanager
    def serving(self, chat: ChatFormat, *, port: int = 0) -> Iterator[FakeServer]:
        with serving(chat, self, port=port) as self.server:
            yield self.server


def overrides(*urls: str, staleness: int) -> tuple[str, ...]:
    """A run whose servers write what the test wants: they are no policy that a probe would know."""
    return (
        "rollout/engine=server",
        f"rollout.engine.urls=[{','.join(urls)}]",
        f"rollout.max_staleness={staleness}",
        "algo/importance=truncate",
        "probe.tolerance=1e9",
        f"data.questions_per_step={PER_STEP}",
        f"rollout.rollouts_per_question={ROLLOUTS}",
        *mixed_for(1),
    )


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trajectory in a run's dumps."""

    id: str
    step: int
    rank: int

    @property
    def began(self) -> int:
        """The version of the weights that its group began with."""
        return int(self.id.rpartition("/")[2].partition(".")[0])


def trained(out: Path) -> list[Trained]:
    """All that the updates of a run took."""
    found = []
    for path in sorted((out / "tokens").glob("*.jsonl")):
        step, _, rank = path.stem.partition(".rank_")
        found += [
            Trained(id=json.loads(line)["id"], step=int(step[5:]), rank=int(rank or 0))
            for line in path.read_text().splitlines()
        ]
    return found


def require_whole(out: Path, world: Path, *, steps: int, staleness: int, ranks: int) -> None:
    """All questions of `steps` updates were trained, none twice, and none that was too old."""
    rows, held = read_rows(out), trained(out)
    assert [row["step"] for row in rows] == list(range(steps))
    assert max(row["rollout/staleness_max"] for row in rows) == staleness, "a weak test"
    assert max(Counter(one.id for one in held).values()) == 1
    groups = {one.id.rpartition(".")[0]: one for one in held}
    assert len(held) == ROLLOUTS * len(groups), "a group is trained whole, by one rank"
    places = Counter((one.step, one.rank) for one in groups.values())
    assert places == {
        (step, rank): PER_STEP // ranks for step in range(steps) for rank in range(ranks)
    }
    recipe = load_recipe(ROOT / "recipes/demo_cpu.yaml", [f"data.train=[{world}/train.jsonl]"])
    ids = [json.loads(line)["id"] for line in (world / "train.jsonl").read_text().splitlines()]
    tasks: Any = [Named(id=id) for id in ids]
    first = [ids[index] for index in build_order(recipe, tasks).next_batch(PER_STEP * steps)]
    assert Counter(name.rpartition("/")[0] for name in groups) == Counter(first), "none is lost"
    assert all(0 <= one.step - one.began <= staleness for one in held)
    for version in range(steps):
        begun = sum(one.began <= version for one in groups.values())
        done = sum(one.step < version for one in groups.values())
        assert begun - done <= (staleness + 1) * PER_STEP


@dataclass(frozen=True, kw_only=True)
class Named:
    """As much of a task as the order of questions wants to know."""

    id: str
    source: str = ""


def require_weights(out: Path, *servers: FakeServer) -> None:
    """Servers hold the policy that the run exported, and no other copy of it is left."""
    assert not list((out / "weights").iterdir())
    exported = load_file(out / "export" / "model.safetensors")
    for server in servers:
        assert server.weights.keys() >= exported.keys()
        assert all(torch.equal(server.weights[name], exported[name]) for name in exported)


def wait_for_rows(out: Path, number: int) -> None:
    log = out / "metrics.jsonl"
    wait_until(lambda: log.exists() and len(read_rows(out)) >= number, most_s=PATIENCE_S)


@contextmanager
def running(world: Path, out: Path, *values: str, ranks: int = 1) -> Iterator[ForkedRun]:
    """A run that does not outlive the test."""
    run = ForkedRun(world, out, *values, ranks=ranks)
    try:
        yield run
    finally:
        run.kill()


def test_two_agents_with_a_server_each_come_to_what_two_processes_of_one_machine_come_to(
    small_world: Path, tmp_path: Path, chat: ChatFormat
) -> None:
    apart, together = tmp_path / "apart", tmp_path / "together"
    with serving(chat, searches_once) as one, serving(chat, searches_once) as two:
        values = (*overrides(one.url, two.url, staleness=0), "run.steps=2")
        meeting = ["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=x", "--local-addr=127.0.0.1"]
        meeting += [f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
        agents = [
            subprocess.Popen(
                command(small_world, apart, *values, ranks=1, nodes=meeting),
                cwd=ROOT,
                env=environment() | {"TAPO_ENGINE_SECRET": SECRET},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for _ in range(2)
        ]
        try:
            said = [agent.communicate(timeout=PATIENCE_S)[0] for agent in agents]
        finally:
            for agent in agents:
                agent.terminate()  # takes its rank along
        assert [agent.returncode for agent in agents] == [0, 0], "".join(said)[-3000:]
        require_weights(apart, one, two)
        turns = PER_STEP // 2 * ROLLOUTS * 2 * 2
        assert (len(one.asked), len(two.asked)) == (turns + 1, turns), "the probe's turn, and all"
        with running(small_world, together, *values, ranks=2) as run:
            assert run.statuses() == [0, 0], run.said[-3000:]
    # Which of equal calls is answered by another's is up to the clock.
    rows, same = (
        [{n: v for n, v in row.items() if "/cached" not in n} for row in read_rows(out)]
        for out in (apart, together)
    )
    assert rows == same
    assert digest_of_weights(apart / "export") == digest_of_weights(together / "export")
    assert Counter(trained(apart)) == Counter(trained(together))


def test_servers_that_are_killed_cost_a_run_nothing_and_all_of_them_end_it_with_the_reason(
    small_world: Path, tmp_path: Path, chat: ChatFormat
) -> None:
    out, steps = tmp_path / "run", 8
    with ExitStack() as stack:
        # A step has sixteen turns, and at most 24 are of groups that are not complete.
        first, second = Holding(9), Holding(75)
        one, two = (stack.enter_context(script.serving(chat)) for script in (first, second))
        values = (
            *overrides(one.url, two.url, staleness=1),
            f"run.steps={steps}",
            "run.save_every=2",
            "rollout.engine.patience_s=5",
        )
        run = stack.enter_context(running(small_world, out, *values))
        wait_until(lambda: not one.answers.is_set(), most_s=PATIENCE_S)
        time.sleep(0.5)  # What came before is being written.
        wait_until(lambda: {*one.asked} - first.written, most_s=PATIENCE_S)
        lost = {*one.asked} - first.written
        one.die()
        wait_for_rows(out, 3)
        wait_until(lambda: not two.answers.is_set(), most_s=PATIENCE_S)
        assert lost and lost <= {*two.asked}, "what was under way there was asked elsewhere"
        again = stack.enter_context(Holding(1).serving(chat, port=one.server_address[1]))
        wait_until(lambda: again.goes_on.is_set() and again.weights, most_s=PATIENCE_S)
        two.answers.set()
        wait_until(lambda: again.asked, most_s=PATIENCE_S)
        for server in (again, two):
            server.answers.clear()
            server.die()
        assert run.statuses() == [2]
        assert "error: no engine server is left to " in run.said
        assert all(f"\n  {server.url}: " in run.said for server in (one, two))
        assert 3 <= len(read_rows(out)) < steps
        servers = [
            stack.enter_context(serving(chat, takes_its_time, port=server.server_address[1]))
            for server in (one, two)
        ]
        with running(small_world, out, *values) as run:
            assert run.statuses() == [0], run.said[-3000:]
        require_weights(out, *servers)
    require_whole(out, small_world, steps=steps, staleness=1, ranks=1)


def test_two_ranks_killed_in_mid_sync_and_one_of_them_in_mid_update_go_on_from_a_checkpoint(
    small_world: Path, tmp_path: Path, chat: ChatFormat
) -> None:
    out, mark, steps, staleness = tmp_path / "run", tmp_path / "mark", 7, 2
    late = [OneLate(staleness=staleness, last=steps - 1) for _ in range(2)]
    with late[0].serving(chat) as one, late[1].serving(chat) as two:
        values = (
            *overrides(one.url, two.url, staleness=staleness),
            f"run.steps={steps}",
            "run.save_every=2",
            "algo/loss=custom",
            "algo.loss.path=tests.deadly_loss:grpo_until_killed",
            f"algo.loss.arguments={{mark: '{mark}'}}",
        )
        with running(small_world, out, *values, ranks=2) as run:
            wait_for_rows(out, 3)
            two.on_load = run.kill
            assert run.statuses() == [-9, -9]
            two.on_load = lambda: None
            assert two.label == "torn", "it was not killed in mid-sync"
        done = len(read_rows(out)) + 1
        with running(small_world, out, *values, ranks=2) as run:
            wait_for_rows(out, done)
            mark.write_text("1")
            run.ranks[1].join(PATIENCE_S)
            run.kill()  # as torchrun does
            assert run.statuses()[1] == -9 and not mark.exists()
        assert done <= len(read_rows(out)) < steps
        with running(small_world, out, *values, ranks=2) as run:
            assert run.statuses() == [0, 0], run.said[-3000:]
        assert run.said.count("going on after step") == 2
        require_weights(out, one, two)
    require_whole(out, small_world, steps=steps, staleness=staleness, ranks=2)
