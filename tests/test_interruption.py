"""SIGTERM in the middle of things, and stalls: whole runs in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from closing_tool import IDLE_TOOL, NOTES, notes
from forked_runs import train_forked
from process_environment import ROOT, environment
from whole_runs import (
    TIMEOUT_S,
    command,
    digest_of_weights,
    read_rows,
    without_probe,
)

from tapo_train.build import build_interruption
from tapo_train.learner.manifest import checkpoints
from tapo_train.rollout.tensor_parallel import MirroredEngine
from tapo_train.training.interruption import Interruption
from tapo_train.training.watchdog import EXIT_STALLED, START_PATIENCE, Watchdog, _Peer

WORKER = Path(__file__).with_name("watchdog_worker.py")
ENGINE = (
    "rollout/engine=hf",
    "learner.schedule=constant",
    "data.questions_per_step=2",
    "rollout.rollouts_per_question=2",
)


def start(world: Path, out: Path, *overrides: str, ranks: int) -> subprocess.Popen[str]:
    """A run in a process group of its own."""
    return subprocess.Popen(
        command(world, out, *overrides, ranks=ranks),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_rows(out: Path, number: int, *, ranks: int) -> list[int]:
    """Until so many steps are logged; the process ids of the ranks."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        if (out / "metrics.jsonl").exists() and len(read_rows(out)) >= number:
            states = [json.loads(p.read_text()) for p in sorted(out.glob("watchdog/*/rank*.json"))]
            if len(states) == ranks:
                return [state["pid"] for state in states]
        time.sleep(0.02)
    raise AssertionError(f"no {number} steps in {TIMEOUT_S} s")


def test_work_is_given_up_at_once_and_nothing_new_is_begun() -> None:
    interruption = Interruption()
    with interruption.listening():
        assert interruption.attempt(lambda: 7) == 7
        assert not interruption.is_requested
        assert interruption.attempt(lambda: (os.kill(os.getpid(), signal.SIGTERM), 1)) is None
        assert interruption.is_requested
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun passing on what this process got itself
        assert interruption.attempt(lambda: 7) is None
    outside = Interruption()
    with outside.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        assert outside.is_requested, "and what is not attempted goes on"


TWICE = """
import os, signal, time
from tapo_train.training import interruption
asked = interruption.Interruption()
with asked.listening():
    os.kill(os.getpid(), signal.SIGTERM)
    interruption.RELAYED_S = 0.01
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(20)
"""


def test_a_later_sigterm_ends_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", TWICE], cwd=ROOT, env=environment(), timeout=15)
    assert done.returncode == -signal.SIGTERM


def test_a_rollout_on_an_engine_that_ranks_share_is_finished() -> None:
    shared = build_interruption(MirroredEngine(None, None))  # type: ignore[arg-type]
    with shared.listening():
        assert shared.attempt(lambda: (os.kill(os.getpid(), signal.SIGTERM), 1)) == (None, 1)
        assert shared.is_requested
        assert shared.attempt(lambda: 7) == 7, "the others of the group wait for it"


def test_a_rank_that_has_taken_its_file_away_has_said_nothing_new() -> None:
    peer = _Peer(0.0)
    peer.look({"beats": 3, "ticks": 2})
    seen = peer.progress_at
    assert seen > 0.0
    assert peer.look({}) >= 0.0 and peer.progress_at == seen


def test_a_rank_that_loads_a_model_has_more_time_than_one_at_work(tmp_path: Path) -> None:
    """Its patience is its own: others that wait for it at work do not end it, nor does it them."""
    stall_s, now = 1000.0, time.monotonic()
    watchdog = Watchdog(tmp_path, stall_s=0.0)
    watchdog._stall_s = stall_s

    def cause(idle_s: tuple[float, float], stages: tuple[str, str]) -> str:
        peers = []
        watchdog._folder.mkdir(parents=True, exist_ok=True)
        for rank, (idle, stage) in enumerate(zip(idle_s, stages, strict=True)):
            state = {"stage": stage, "beats": 1, "ticks": 1}
            watchdog._heartbeat(rank).write_text(json.dumps(state))
            peer = _Peer(now)
            peer.look(state)
            peer.progress_at = now - idle
            peers.append(peer)
        return watchdog._cause(peers)

    assert START_PATIENCE == 3.0
    assert "no rank has made progress for 1001 s" in cause((1001, 1001), ("rollout", "update"))
    assert cause((1001, 2990), ("rollout", "start")) == ""
    assert cause((2990, 1001), ("start", "rollout")) == ""
    assert "for 1001 s" in cause((1001, 3001), ("rollout", "start"))
    assert cause((3001, 900), ("start", "update")) == ""


@pytest.mark.slow
def test_a_slow_load_is_no_stall_but_a_hang_after_it_is(tmp_path: Path) -> None:
    status, said = outcome(watched(tmp_path, "load", 2.0, ranks=2))
    assert status != 0 and f"exitcode  : {EXIT_STALLED}" in said
    assert "loaded" in said
    assert "rank 1: in rollout for" in said


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, noted = 2, tmp_path / "notes"
    noted.mkdir()
    monkeypatch.setenv(NOTES, str(noted))
    engine, most = (*ENGINE, IDLE_TOOL, "run.save_every=0"), 500
    out = tmp_path / "stopped"
    process = start(small_world, out, *engine, f"run.steps={most}", ranks=ranks)
    try:
        pids = wait_for_rows(out, 1, ranks=ranks)
        os.kill(pids[0], signal.SIGTERM)  # one rank is enough
        said, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said[-3000:]
    assert "SIGTERM" in said
    assert notes(noted) == ["closed\n"] * ranks
    done = len(read_rows(out))
    assert 1 <= done < most
    assert [path.name for path in checkpoints(out / "checkpoints")] == [f"step-{done:06d}"]
    assert not (out / "export").exists()
    assert not list((out / "watchdog").iterdir())
    engine = (*engine, f"run.steps={done + 2}")
    rows = train_forked(small_world, out, *engine, ranks=ranks)
    assert notes(noted) == ["closed\n"] * 2 * ranks
    whole = train_forked(small_world, tmp_path / "whole", *engine, ranks=ranks)
    # A resumed run probes with a turn of its own, from its own first sync on.
    assert [without_probe(row) for row in rows] == [without_probe(row) for row in whole]
    ours, theirs = (digest_of_weights(tmp_path / name / "export") for name in ("stopped", "whole"))
    assert ours == theirs


def watched(folder: Path, kind: str, stall_s: float, *, ranks: int) -> subprocess.Popen[str]:
    """The worker; in a process group of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.Popen(
        [sys.executable, *(launcher if ranks > 1 else []), WORKER, folder, kind, str(stall_s)],
        env=environment() | {"PYTHONPATH": f"{ROOT}:{WORKER.parent}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def outcome(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status and output; a worker that goes on hanging fails the test."""
    try:
        said, _ = process.communicate(timeout=90)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said


@pytest.mark.slow
def test_when_a_rank_hangs_all_ranks_dump_their_stacks_and_end(tmp_path: Path) -> None:
    status, said = outcome(watched(tmp_path, "sleep", 2.0, ranks=2))
    assert status != 0
    assert f"exitcode  : {EXIT_STALLED}" in said
    (folder,) = (tmp_path / "watchdog").iterdir()
    reports = [(folder / f"stacks.rank{rank}.txt").read_text() for rank in (0, 1)]
    assert "in main" in reports[0] and "distributed.py" in reports[0]
    assert "in hang_here" in reports[1]
    assert "rank 1: in rollout for" in said
    assert "waiting for 3 calls of text_search\n" in said
    assert "rank 0: in advantage for" in said


@pytest.mark.slow
def test_a_call_that_holds_the_interpreter_is_dumped_from_outside(tmp_path: Path) -> None:
    status, _ = outcome(watched(tmp_path, "hold", 2.0, ranks=1))
    assert status == 1
    (stacks,) = tmp_path.glob("watchdog/*/stacks.rank0.txt")
    assert "in hang_here" in stacks.read_text()


@pytest.mark.slow
def test_slow_progress_of_one_rank_is_no_stall_of_the_others(tmp_path: Path) -> None:
    status, said = outcome(watched(tmp_path, "work", 3.0, ranks=2))
    assert status == 0, said
    assert not list((tmp_path / "watchdog").iterdir())
