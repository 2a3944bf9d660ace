"""Runs whose ranks are forks of one process that has imported what is heavy.

To start Python, torch and DeepSpeed takes ten CPU-seconds; a fork has them. Else a rank is what
torchrun starts: a process with its number in the environment, that can be killed.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from fake_vllm import SECRET
from process_environment import ROOT, environment, free_port
from whole_runs import arguments, read_rows

PATIENCE_S = 600
"""[s] for a run that takes seconds, on a machine that does other things as well."""

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["tapo_train.runs", "deepspeed"])


class ForkedRun:
    """A run over a world, under way; what it says goes to a file."""

    def __init__(self, world: Path, out: Path, *overrides: str, ranks: int) -> None:
        self._log = out.with_suffix(".log")
        line = arguments(world, out, *overrides)
        self.ranks = _started(ranks, self._log, _commands, line)

    def kill(self) -> None:
        """kill -9 of every rank."""
        for process in self.ranks:
            process.kill()

    def statuses(self) -> list[int | None]:
        """The exit status of each rank, once all have ended."""
        return _statuses(self.ranks, PATIENCE_S)

    @property
    def said(self) -> str:
        """By all ranks, and by runs before it into the same folder."""
        return self._log.read_text()


def train_forked(world: Path, out: Path, *overrides: str, ranks: int) -> list[dict[str, Any]]:
    """Run to the end; the rows of metrics.jsonl."""
    run = ForkedRun(world, out, *overrides, ranks=ranks)
    assert run.statuses() == [0] * ranks, run.said
    return read_rows(out)


def tapo_train(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """What `python -m tapo_train` does with these words; a hang is ended.

    Args:
        variables: more of its environment.
    """
    with tempfile.TemporaryDirectory() as folder:
        said, complained = Path(folder) / "stdout", Path(folder) / "stderr"
        outer = environment() | variables
        process = _forks.Process(
            target=_alone, args=(list(words), outer, said, complained), daemon=True
        )
        process.start()
        (status,) = _statuses([process], PATIENCE_S)
        process.kill()
        assert status is not None, f"hangs: {said.read_text()}{complained.read_text()}"
        return subprocess.CompletedProcess(words, status, said.read_text(), complained.read_text())


def run_ranks(ranks: int, worker: Path, *arguments: object, deadline_s: float) -> str:
    """What the ranks of a worker's file say, which all end well; a hang is ended."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "said"
        words = [str(worker), *map(str, arguments)]
        processes = _started(ranks, log, _works, words)
        statuses = _statuses(processes, deadline_s)
        for process in processes:
            process.kill()
        said = log.read_text()
    assert statuses == [0] * ranks, f"{statuses}: {said[-6000:]}"
    return said


def _started(
    ranks: int, log: Path, work: Callable[[list[str]], None], words: list[str]
) -> list[BaseProcess]:
    port = free_port()
    processes: list[BaseProcess] = [
        _forks.Process(
            target=_rank, args=(work, words, rank, ranks, port, log, environment()), daemon=True
        )
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def _statuses(processes: list[BaseProcess], most_s: float) -> list[int | None]:
    """Once all have ended, one of them badly, or the time is over."""
    deadline = time.monotonic() + most_s
    while any(process.exitcode is None for process in processes):
        if time.monotonic() > deadline or any(process.exitcode for process in processes):
            time.sleep(1)  # what the others say of it
            break
        wait([p.sentinel for p in processes if p.exitcode is None], deadline - time.monotonic())
    return [process.exitcode for process in processes]


def _rank(
    work: Callable[[list[str]], None],
    words: list[str],
    rank: int,
    ranks: int,
    port: int,
    log: Path,
    outer: dict[str, str],
) -> None:
    group = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TAPO_ENGINE_SECRET": SECRET,
    }
    _become(outer | group, log, log)
    work(words)


def _alone(words: list[str], outer: dict[str, str], said: Path, complained: Path) -> None:
    _become(outer, said, complained)
    _commands(words)


def _become(variables: dict[str, str], said: Path, complained: Path) -> None:
    """A process of its own: a fork has the environment of the first one's time."""
    os.environ.clear()
    os.environ |= variables
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    for number, file in ((1, said), (2, complained)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)

    import torch

    torch.set_num_threads(1)


def _commands(line: list[str]) -> None:
    from tapo_train.__main__ import main

    sys.exit(main(line))


def _works(words: list[str]) -> None:
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))
    runpy.run_path(words[0], run_name="__main__")
