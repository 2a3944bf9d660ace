"""The manifest of a checkpoint folder: what it holds, with a hash of every file.

No torch here: finding, verifying and pruning checkpoints starts fast.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from tapo_train.errors import CheckpointError

MANIFEST = "manifest.json"
POLICY = "policy"
"""Subfolder with the weights as a Hugging Face folder."""
FORMAT = 2

_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint is and what its files hash to."""

    step: int
    """Finished training steps."""
    updates: int
    """Optimizer updates done."""
    ranks: int
    """Number of ranks that wrote it; any number can read it."""
    settings: Mapping[str, Any]
    """`LearnerSettings` of the run."""
    score: float | None
    """Accuracy on the validation questions after this step, in [0, 1]; None: not validated."""
    files: Mapping[str, str]
    """Path within the folder -> sha256 in hex."""
    format: int = FORMAT
    sha256: str = ""
    """Of this manifest with an empty string here."""

    def text(self) -> str:
        """The file's content, its own hash included."""
        digest = hashlib.sha256(replace(self, sha256="")._json().encode()).hexdigest()
        return replace(self, sha256=digest)._json()

    def _json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read a folder's manifest.

        Raises:
            CheckpointError: there is none, or it has been damaged or is of another format.
        """
        path = folder / MANIFEST
        try:
            text = path.read_text(encoding="utf-8")
            entries = json.loads(text)
            found = entries.get("format")
            if found != FORMAT:
                raise CheckpointError(f"{path}: format is {found!r}; wanted {FORMAT}")
            manifest = cls(**entries)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path}: missing; wanted the manifest of a run") from error
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: no readable manifest ({error}); wanted a folder written by a run"
            ) from error
        if manifest.text() != text:
            raise CheckpointError(f"{path}: damaged: its content does not fit its sha256")
        return manifest

    def verify(self, folder: Path, *, files: Sequence[str] | None = None) -> None:
        """Hash the files (all, if none are named) and compare.

        Raises:
            CheckpointError: a file is missing or has changed; the message names it.
        """
        for name in sorted(self.files) if files is None else files:
            path = folder / name
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise CheckpointError(f"{folder / MANIFEST}: names {name}, outside its folder")
            if path.is_symlink() or not path.is_file():
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


def checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders under `root` by ascending step; a missing root has none.

    A folder gets such a name when it is complete: one that lacks a file has been damaged.
    """
    if not root.is_dir():
        return []
    found = [
        (int(match[1]), path)
        for path in root.iterdir()
        if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found)]


def latest(root: Path) -> Path | None:
    """The newest checkpoint; None if there is none."""
    found = checkpoints(root)
    return found[-1] if found else None


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint so that no run takes it for one; its new name."""
    aside = folder.with_name(f"damaged-{folder.name}")
    for number in range(2, 1000):
        if not aside.exists():
            break
        aside = folder.with_name(f"damaged-{folder.name}.{number}")
    return folder.rename(aside)


def prune(root: Path, *, keep_last: int, keep_best: int = 0) -> list[Path]:
    """Delete checkpoints that are neither among the newest nor among the best; which.

    A folder without a readable manifest is not counted and not deleted.

    Args:
        keep_last: newest ones that stay; 0 keeps all.
        keep_best: ones with the highest score that stay, the newer one of equals.
    """
    if not keep_last:
        return []
    readable = [(path, score) for path in checkpoints(root) if (score := _score(path)) is not None]
    newest = [path for path, _ in readable[-keep_last:]]
    scored = sorted(
        ((score, number) for number, (_, score) in enumerate(readable) if score >= 0), reverse=True
    )
    best = [readable[number][0] for _, number in scored[:keep_best]]
    deleted = [path for path, _ in readable if path not in newest and path not in best]
    for path in deleted:
        # Renamed first: what is left of it when the power fails is no checkpoint.
        shutil.rmtree(path.rename(path.with_name(f".{path.name}.deleted")))
    return deleted


def discard_remains(root: Path) -> None:
    """Delete what a killed process left half written or half deleted.

    A checkpoint that was about to be replaced by another of its step gets its name back.
    """
    for path in root.glob(".step-*.replaced"):
        final = path.with_name(path.name.removeprefix(".").removesuffix(".replaced"))
        if final.exists():
            shutil.rmtree(path)
        else:
            path.rename(final)
    for pattern in (".step-*.partial", ".step-*.deleted"):
        for path in root.glob(pattern):
            shutil.rmtree(path)


def _score(folder: Path) -> float | None:
    """A checkpoint's score, -1 if it was not validated, None if its manifest is unreadable."""
    try:
        score = Manifest.read(folder).score
    except CheckpointError:
        return None
    return -1.0 if score is None else score
