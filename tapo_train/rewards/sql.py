"""Whether two queries give the same rows (BIRD, Spider), on a sqlite file opened for reading.

The query of a policy is hostile. It may only select, from the one file; it has a time limit, a row
limit and a limit of what a value may hold. As in BIRD's evaluator the rows are compared as a set. A
query that cannot be run is wrong; a file that is not there, or an accepted query that cannot be
run, is a failure outside the policy.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from tapo_train.errors import ConfigError, ToolDownError
from tapo_train.rewards.score import Score
from tapo_train.types import Trajectory

__all__ = ["ExecutionMatch", "rows_of_query"]

MOST_ROWS = 100_000
MOST_BYTES = 10_000_000
"""Of one value, and of the query."""
_STEPS = 10_000
"""Instructions of sqlite between two looks at the clock."""
_ALLOWED = frozenset(
    {
        sqlite3.SQLITE_SELECT,
        sqlite3.SQLITE_READ,
        sqlite3.SQLITE_FUNCTION,
        sqlite3.SQLITE_RECURSIVE,
    }
)


def rows_of_query(
    database: Path, query: str, *, seconds: float = 30.0
) -> frozenset[tuple[object, ...]]:
    """The rows that a query selects, as a set.

    Raises:
        sqlite3.Error: it cannot be run, may not, or takes or gives too much.
    """
    ends = time.monotonic() + seconds
    with closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)) as file:
        file.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MOST_BYTES)
        file.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        file.text_factory = lambda data: data.decode(errors="replace")
        file.set_authorizer(_authorized)
        file.set_progress_handler(lambda: time.monotonic() > ends, _STEPS)
        found = file.execute(query).fetchmany(MOST_ROWS + 1)
        if len(found) > MOST_ROWS:
            raise sqlite3.DataError(f"more than {MOST_ROWS} rows")
        return frozenset(found)


def _authorized(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    if action not in _ALLOWED or "load_extension" in (first, second):
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK


class ExecutionMatch:
    """The part of a reward: 1 if the answer's rows are those of an accepted query, else 0.

    Args:
        folder: holds `<db_id>/<db_id>.sqlite` for each database.

    Raises:
        ConfigError: the folder is not there.
    """

    def __init__(self, folder: Path, *, seconds: float = 30.0) -> None:
        if not folder.is_dir():
            raise ConfigError(f"reward.parts: databases is {folder}; wanted a folder")
        self._folder = folder
        self._seconds = seconds

    async def __call__(self, trajectory: Trajectory) -> Score:
        """Raises ToolDownError if the accepted queries cannot be run."""
        answer = (trajectory.answer or "").strip()
        if not answer:
            return Score(value=0.0)
        database = self._database(trajectory)
        right = await asyncio.to_thread(self._is_right, database, answer, trajectory.task.answers)
        return Score(value=float(right))

    def _database(self, trajectory: Trajectory) -> Path:
        name = trajectory.task.metadata.get("db_id")
        path = self._folder / str(name) / f"{name}.sqlite"
        if not isinstance(name, str) or Path(name).name != name or not path.is_file():
            raise ToolDownError(f"task {trajectory.task.id}: found no database {path}")
        return path

    def _is_right(self, database: Path, answer: str, accepted: Sequence[str]) -> bool:
        try:
            wanted = [rows_of_query(database, query, seconds=self._seconds) for query in accepted]
        except sqlite3.Error as error:
            raise ToolDownError(f"{database}: an accepted query cannot be run: {error}") from error
        try:
            return rows_of_query(database, answer, seconds=self._seconds) in wanted
        except (sqlite3.Error, sqlite3.Warning, ValueError):
            return False
