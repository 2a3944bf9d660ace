"""A run that hangs says where, on all ranks, and ends.

Every rank has a thread that writes what the rank is doing to a small file in the run folder
and reads the files of the others: no collective, as ranks that hang cannot take part in one.
When no rank has made progress for `run.stall_s` (`START_PATIENCE` times as long while models are
loaded), every rank dumps the Python stacks of its
threads and the process ends without asking its main thread, which may sit in a C call.

    RUN/watchdog/<attempt>/rank0.json         stage, since when, calls under way
    RUN/watchdog/<attempt>/stacks.rank0.txt   after a stall

A rank whose interpreter is held by a C call cannot run its thread; the stacks are then
dumped by a timer outside the interpreter (exit status 1).
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tapo_train.learner import distributed
from tapo_train.report.files import write_atomically

EXIT_STALLED = 3
"""Exit status of a run that made no progress."""
START = "start"
"""Until the first stage is entered: models are loaded, which tells of no progress on the way."""
START_PATIENCE = 3.0
"""A rank may be silent for so many times `run.stall_s` there; a collective's timeout is longer."""
LONGEST_TICK_S = 5.0
PEERS_S = 15.0
"""How long a stalled rank waits for the others' stacks before it ends."""


def _nobody(stage: str) -> None:
    pass


class _Peer:
    """When a rank's file last said something new, by this rank's clock."""

    def __init__(self, now: float) -> None:
        self._beats = self._ticks = -1
        self.patience = START_PATIENCE
        """Limits for this rank, in units of `run.stall_s`."""
        self.progress_at = self._alive_at = now

    def look(self, state: Mapping[str, Any]) -> float:
        """Compare with what the file held before; [s] since it last changed."""
        now = time.monotonic()
        # A rank that has closed took its file away, which is nothing new.
        if "stage" in state:
            self.patience = _patience(state["stage"])
        if (beats := state.get("beats", self._beats)) != self._beats:
            self._beats, self.progress_at = beats, now
        if (ticks := state.get("ticks", self._ticks)) != self._ticks:
            self._ticks, self._alive_at = ticks, now
        return now - self._alive_at


class Watchdog:
    """Watches this rank and the others from its creation to `close`.

    Args:
        folder: of the run, shared by the ranks.
        stall_s: without progress on any rank for so long the run is stopped; 0: never.
    """

    def __init__(self, folder: Path, *, stall_s: float) -> None:
        self._rank, self._ranks = distributed.rank(), distributed.world_size()
        self._stall_s = stall_s
        self._tick_s = min(LONGEST_TICK_S, stall_s / 4)
        self.calls: Callable[[], Mapping[str, int]] = dict
        """Calls under way by tool, for the report."""
        self.told: Callable[[str], None] = _nobody
        """Told of each stage that is entered."""
        self._stage, self._began, self._beats = START, time.monotonic(), 0
        self._ticks = 0
        self._closed = threading.Event()
        attempt = distributed.broadcast_object(f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
        self._folder: Path = folder / "watchdog" / attempt
        if stall_s:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._stacks = self._path("stacks").open("w", encoding="utf-8")
            self._set_timer()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def enter(self, stage: str) -> None:
        """Say what this rank does from now on. Entering a stage is progress."""
        self._stage, self._began = stage, time.monotonic()
        self.told(stage)
        self.beat()

    def beat(self) -> None:
        """Say that this rank has made progress within its stage."""
        self._beats += 1

    def close(self) -> None:
        """Stop watching and take this rank's files away."""
        if not self._stall_s or self._closed.is_set():
            return
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._stacks.close()
        for path in (self._path("stacks"), self._heartbeat(self._rank)):
            path.unlink(missing_ok=True)
        distributed.barrier()
        if self._rank == 0:
            self._folder.rmdir()

    def _watch(self) -> None:
        """The thread: write, look, until closed or stalled."""
        peers = [_Peer(time.monotonic()) for _ in range(self._ranks)]
        while not self._closed.wait(self._tick_s):
            self._set_timer()
            self._ticks += 1
            try:
                write_atomically(self._heartbeat(self._rank), json.dumps(self._state()))
                cause = self._cause(peers)
            except (OSError, ValueError):
                # A shared folder may be out of reach for a while, or show an old file half;
                # the next tick tries again.
                continue
            if cause:
                self._end(cause)

    def _set_timer(self) -> None:
        """Dump and end from outside the interpreter unless set anew in time."""
        limit_s = self._stall_s * _patience(self._stage)
        faulthandler.dump_traceback_later(limit_s, exit=True, file=self._stacks)

    def _cause(self, peers: Sequence[_Peer]) -> str:
        """Why the run must end, or "" if it need not."""
        for rank, peer in enumerate(peers):
            if self._path("stalled", rank).exists():
                return f"rank {rank} has stopped the run"
            silent_s = peer.look(self._read(rank))
            if silent_s > self._stall_s * peer.patience:
                return f"rank {rank} has given no sign of life for {silent_s:.0f} s"
        now = time.monotonic()
        if any(now - peer.progress_at <= self._stall_s * peer.patience for peer in peers):
            return ""
        idle_s = now - max(peer.progress_at for peer in peers)
        return f"no rank has made progress for {idle_s:.0f} s"

    def _end(self, cause: str) -> None:
        """Dump, tell the others, wait for their dumps, end the process."""
        lines = [f"  {self._told(rank)}" for rank in range(self._ranks)]
        report = "\n".join([f"rank {self._rank}: stalled: {cause}", *lines])
        print(report, file=self._stacks, flush=True)
        faulthandler.cancel_dump_traceback_later()
        faulthandler.dump_traceback(file=self._stacks, all_threads=True)
        self._stacks.flush()
        write_atomically(self._path("stalled"), report + "\n")
        deadline = time.monotonic() + PEERS_S
        others = [self._path("stalled", rank) for rank in range(self._ranks)]
        while not all(path.exists() for path in others) and time.monotonic() < deadline:
            time.sleep(0.1)
        print(f"{report}\n  stacks: {self._folder}/stacks.rank*.txt", file=sys.stderr, flush=True)
        os._exit(EXIT_STALLED)

    def _state(self) -> dict[str, Any]:
        return {
            "stage": self._stage,
            "for_s": round(time.monotonic() - self._began, 1),
            "calls": dict(self.calls()),
            "beats": self._beats,
            "ticks": self._ticks,
            "pid": os.getpid(),
        }

    def _read(self, rank: int) -> dict[str, Any]:
        """What a rank last wrote; nothing if it has not written yet."""
        try:
            state: dict[str, Any] = json.loads(self._heartbeat(rank).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return state

    def _told(self, rank: int) -> str:
        state = self._read(rank)
        calls = ", ".join(f"{n} calls of {tool}" for tool, n in state.get("calls", {}).items() if n)
        waiting = f", waiting for {calls}" if calls else ""
        stage, for_s = state.get("stage", START), state.get("for_s", 0.0)
        return f"rank {rank}: in {stage} for {for_s:.0f} s{waiting}"

    def _heartbeat(self, rank: int) -> Path:
        return self._folder / f"rank{rank}.json"

    def _path(self, kind: str, rank: int | None = None) -> Path:
        return self._folder / f"{kind}.rank{self._rank if rank is None else rank}.txt"


def _patience(stage: str) -> float:
    return START_PATIENCE if stage == START else 1.0
