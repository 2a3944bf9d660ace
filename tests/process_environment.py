"""The environment of a process that a test starts."""

from __future__ import annotations

import os
import socket
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
