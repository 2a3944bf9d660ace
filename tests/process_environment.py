"""The environment of a process that a test starts."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GROUP_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a learner in this process leaves in the environment."""


def environment() -> dict[str, str]:
    """One thread per process, as two ranks share two cores; no process group of this process."""
    outer = {name: value for name, value in os.environ.items() if name not in GROUP_VARIABLES}
    return outer | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def run_ranks(ranks: int, worker: Path, *arguments: object, deadline_s: float) -> str:
    """The worker's output under torchrun, in a group of its own so that a hang can be ended."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), str(worker), *map(str, arguments)]
    path = f"{ROOT}{os.pathsep}{worker.parent}"
    process = subprocess.Popen(
        command,
        env=environment() | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output[-6000:]
    return output
