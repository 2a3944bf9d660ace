"""Files that lie beside a task file and say more about its rows: InfoSeek's question types and
entities.

They have a row for each row they know, in the order of the task file. Both are read side by side,
so that nothing is held.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tapo_train.data.row_files import rows_of
from tapo_train.data.rows import Row
from tapo_train.errors import DataError

__all__ = ["Companion", "companions_of"]


class Companion:
    """One such file.

    Args:
        key: column that both files have.
    """

    def __init__(self, path: Path, *, key: str) -> None:
        self._path = path
        self._key = key
        self._rows = self._read()
        self._next = next(self._rows, None)

    def about(self, row: Row) -> Mapping[str, Any]:
        """What it says of `row`; {} if it does not know it."""
        if self._next is None or self._next[self._key] != row.fields.get(self._key):
            return {}
        found, self._next = self._next, next(self._rows, None)
        return found

    def require_used(self) -> None:
        """Raises DataError if it speaks of rows that never came: it is in another order."""
        if self._next is not None:
            raise DataError(
                f"{self._path}: {self._key} {self._next[self._key]!r} did not come in the task "
                "file after the one before it; wanted the rows in the task file's order"
            )

    def _read(self) -> Iterator[Mapping[str, Any]]:
        for where, _, read in rows_of(self._path):
            row = read()
            if self._key not in row.fields:
                raise DataError(f"{where}: found no {self._key}")
            yield row.fields


def companions_of(path: Path, endings: tuple[str, ...], *, key: str) -> list[Companion]:
    """Those that are there: `<stem>_<ending>.jsonl` beside `path`."""
    found = [path.with_name(f"{path.stem}_{ending}.jsonl") for ending in endings]
    return [Companion(file, key=key) for file in found if file.is_file()]
