"""Runs whose ranks are forks of one process that has imported what is heavy.

To start Python, torch and DeepSpeed takes ten CPU-seconds; a fork has them. Else a rank is what
torchrun starts: a process with its number in the environment, that can be killed.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
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
        port = free_port()
        self.ranks: list[BaseProcess] = [
            _forks.Process(
                target=_rank, args=(line, rank, ranks, port, self._log, environment()), daemon=True
            )
            for rank in range(ranks)
        ]
        for process in self.ranks:
            process.start()

    def kill(self) -> None:
        """kill -9 of every rank."""
        for process in self.ranks:
            process.kill()

    def statuses(self) -> list[int | None]:
        """The exit status of each rank, once all have ended."""
        for process in self.ranks:
            process.join(PATIENCE_S)
        return [process.exitcode for process in self.ranks]

    @property
    def said(self) -> str:
        """By all ranks, and by runs before it into the same folder."""
        return self._log.read_text()


def train_forked(world: Path, out: Path, *overrides: str, ranks: int) -> list[dict[str, Any]]:
    """Run to the end; the rows of metrics.jsonl."""
    run = ForkedRun(world, out, *overrides, ranks=ranks)
    assert run.statuses() == [0] * ranks, run.said
    return read_rows(out)


def _rank(
    line: list[str], rank: int, ranks: int, port: int, log: Path, outer: dict[str, str]
) -> None:
    # A fork has the environment of the first one's time.
    os.environ |= outer | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TAPO_ENGINE_SECRET": SECRET,
    }
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)

    import torch

    from tapo_train.__main__ import main

    torch.set_num_threads(1)
    sys.exit(main(line))
