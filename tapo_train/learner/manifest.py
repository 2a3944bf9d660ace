"""The manifest of a checkpoint folder: what it holds, with a hash of every file.

No torch here: finding, verifying and pruning checkpoints starts fast.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tapo_train.errors import CheckpointError

MANIFEST = "manifest.json"
POLICY = "policy"
"""Subfolder with the weights as a Hugging Face folder."""
FORMAT = 1

_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint is and what its files hash to."""

    step: int
    world_size: int
    zero_stage: int
    precision: str
    files: Mapping[str, str]
    """Path within the folder -> sha256 in hex."""
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Write it into the folder it describes."""
        text = json.dumps(asdict(self), indent=1, sort_keys=True)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read a folder's manifest.

        Raises:
            CheckpointError: there is none, or it cannot be read.
        """
        path = folder / MANIFEST
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
            manifest = cls(**entries)
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{path}: no readable manifest ({error}); wanted a folder written by a run"
            ) from error
        if manifest.format != FORMAT:
            raise CheckpointError(f"{path}: format is {manifest.format}; wanted {FORMAT}")
        return manifest

    def verify(self, folder: Path, *, files: Sequence[str] | None = None) -> None:
        """Hash the files (all, if none are named) and compare.

        Raises:
            CheckpointError: a file is missing or has changed; the message names it.
        """
        for name in sorted(self.files) if files is None else files:
            path = folder / name
            if not path.is_file():
                raise CheckpointError(f"{path}: missing; wanted the file of step {self.step}")
            found = file_sha256(path)
            if found != self.files[name]:
                raise CheckpointError(
                    f"{path}: damaged: sha256 is {found}; wanted {self.files[name]}"
                )


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_name(step: int) -> str:
    """Name of the checkpoint after `step` steps."""
    return f"step-{step:06d}"


def complete_checkpoints(root: Path) -> list[Path]:
    """Folders under `root` with a manifest, by ascending step. A missing root has none."""
    if not root.is_dir():
        return []
    found = [
        (int(match[1]), path)
        for path in root.iterdir()
        if (match := _NAME.fullmatch(path.name)) and (path / MANIFEST).is_file()
    ]
    return [path for _, path in sorted(found)]


def latest(root: Path) -> Path | None:
    """The newest complete checkpoint; None if there is none."""
    found = complete_checkpoints(root)
    return found[-1] if found else None


def prune(root: Path, *, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints; 0 keeps all."""
    if keep_last:
        for path in complete_checkpoints(root)[:-keep_last]:
            shutil.rmtree(path)
