"""Files that are there whole or not at all, and errors that say which."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tapo_train.errors import ConfigError

__all__ = ["naming", "require_writable", "write_atomically"]


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError of the block name `path`: a full disk does not say by itself what it lacks."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` beside `path`, then rename: a killed process leaves old or new, never half.

    Safe against `kill -9`, not against loss of power (nothing is forced to the disk).
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)


def require_writable(folder: Path, *, field: str) -> None:
    """Make `folder` if it is not there, and try it.

    Raises:
        ConfigError: naming `field`, if nothing can be written there.
    """
    trial = folder / f".writable.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial.write_bytes(b"\0")
        trial.unlink()
    except OSError as error:
        raise ConfigError(
            f"{field}: found {folder}, where nothing can be written ({error.strerror}); wanted a "
            "folder with room and the right to write"
        ) from error
