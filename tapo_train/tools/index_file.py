"""Opening the files the search tools answer from."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from tapo_train.errors import DataError


def open_index(path: Path, what: str) -> TextIO:
    """A jsonl file for reading.

    Raises:
        DataError: it cannot be opened.
    """
    try:
        return path.open(encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"{what} {path}: cannot be read ({error.strerror}); wanted jsonl"
        ) from error
