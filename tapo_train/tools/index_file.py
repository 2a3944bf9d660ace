"""Opening the files the search tools answer from, and telling them apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from tapo_train.errors import DataError

_GZIP = b"\x1f\x8b"


def index_lines(path: Path, what: str) -> Iterator[tuple[str, str]]:
    """(place, line) of every line of a jsonl file that is not blank, numbered from 1.

    Raises:
        DataError: it cannot be opened, or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", decoded(line, f"{what} {path}:{number}")
    except OSError as error:
        raise DataError(
            f"{what} {path}: cannot be read ({error.strerror}); wanted jsonl"
        ) from error


def decoded(line: bytes, where: str) -> str:
    """A line of a text file in UTF-8.

    Raises:
        DataError: it is compressed, or not UTF-8.
    """
    if line.startswith(_GZIP):
        raise DataError(f"{where}: found a compressed file; wanted jsonl, unpacked")
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: found the byte {line[error.start]:#04x} at {error.start}, which is not "
            "UTF-8; wanted jsonl in UTF-8"
        ) from error


class TextDigest:
    """Of a list of texts that comes text by text; differs when they do, wherever borders lie."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, text: str) -> None:
        """The next text."""
        encoded = text.encode("utf-8", "surrogatepass")
        self._digest.update(len(encoded).to_bytes(8, "big"))
        self._digest.update(encoded)

    def hex(self) -> str:
        """16 hex digits."""
        return self._digest.hexdigest()[:16]


def digest_of(texts: Iterable[str]) -> str:
    """The `TextDigest` of a whole list."""
    digest = TextDigest()
    for text in texts:
        digest.add(text)
    return digest.hex()
