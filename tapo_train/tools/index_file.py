"""Opening the files the search tools answer from, and telling them apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
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


def digest_of(texts: Iterable[str]) -> str:
    """16 hex digits that differ when the list of texts does, wherever its borders lie."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big"))
        digest.update(encoded)
    return digest.hexdigest()[:16]
