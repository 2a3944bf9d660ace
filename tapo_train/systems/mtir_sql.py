"""MTIR-SQL (arXiv 2510.25510): text to SQL, with the database to ask in between.

    tools:
      names: []
      extra: [{path: tapo_train.systems.mtir_sql:SqlTool, arguments: {databases: data/databases}}]
    reward:
      parts:
        accuracy:
          name: custom
          path: tapo_train.systems.mtir_sql:ExecutionMatch
          arguments: {databases: data/databases}
      process: [{path: tapo_train.systems.mtir_sql:TrajectoryFilter}]

A task names its database in its field `database`, a path below the folder; its accepted answer is
the SQL that is right. Queries run in the sandbox, read-only (`tools/sqlite_query.py`). The paper
keeps trajectories above a threshold of quality; ours are left out for the reasons that
`TrajectoryFilter` names, which are counted. No KL penalty: `algo.kl.coef` is 0 by default.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from tapo_train.data.images import resolve_inside
from tapo_train.errors import DataError, ToolArgumentError, ToolError, ToolRefusedError
from tapo_train.tools.base import ToolContext
from tapo_train.tools.sandbox import Sandbox, SandboxLimits
from tapo_train.training.process import PolicyAccess
from tapo_train.types import Observation, Outcome, StopReason, Task, Trajectory

__all__ = ["ExecutionMatch", "SqlArguments", "SqlTool", "TrajectoryFilter", "rows_match"]

MATCH_ROWS = 100_000
MATCH_BYTES = 8 * 2**20
_FENCE = re.compile(r"\A```(?:sql)?\s*(.*?)\s*```\Z", re.DOTALL | re.IGNORECASE)
_QUOTED = re.compile(r"'(?:[^']|'')*'|\"[^\"]*\"|`[^`]*`|\[[^\]]*\]|--[^\n]*|/\*.*?\*/", re.DOTALL)


class SqlArguments(BaseModel):
    """Arguments of sql_tool."""

    model_config = ConfigDict(extra="forbid", strict=True)

    sql: Annotated[str, Field(description="one SELECT statement for sqlite", min_length=1)]


class SqlTool:
    """Run a query over the task's database and show the first rows.

    Args:
        databases: the folder that tasks name their database in.
        max_rows: shown; that there are more is said.
        max_bytes: of the values shown, as JSON.
        timeout_s: [s] a query may take.
    """

    name = "sql_tool"
    description = "Run an SQL query on the database of the question."
    reads: frozenset[str] = frozenset({"task"})
    arguments_model: type[BaseModel] = SqlArguments

    def __init__(
        self, databases: str, max_rows: int = 10, max_bytes: int = 2000, timeout_s: float = 5.0
    ) -> None:
        self._folder = Path(databases)
        self._max_rows, self._max_bytes = max_rows, max_bytes
        self._sandbox = Sandbox(SandboxLimits(timeout_s=timeout_s))
        self.version = f"1 {_listing(self._folder)} {max_rows} {max_bytes}"

    async def run(self, arguments: SqlArguments, context: ToolContext) -> Observation:
        """Column names and rows, a line each.

        Raises:
            ToolArgumentError: sqlite does not understand the query.
            ToolRefusedError: it would do more than read, or takes too long.
        """
        database = database_of(context.task, self._folder)
        found = await asyncio.to_thread(
            self._sandbox.query,
            database,
            arguments.sql,
            max_rows=self._max_rows,
            max_bytes=self._max_bytes,
        )
        if "error" in found:
            kind = ToolRefusedError if found["refused"] else ToolArgumentError
            raise kind(f"sql_tool: {found['error']}")
        lines = [found["columns"], *found["rows"]]
        text = "\n".join(" | ".join(map(_shown, line)) for line in lines)
        return Observation(text=text + ("\n…" if found["more"] else ""))

    def close(self) -> None:
        """End the sandbox's processes."""
        self._sandbox.close()


class ExecutionMatch:
    """1 if the answer's query gives what the accepted one gives, else 0: execution accuracy.

    Args:
        databases: as for the tool.
        timeout_s: [s] a query may take; BIRD allows 30.
    """

    def __init__(self, databases: str, timeout_s: float = 30.0) -> None:
        self._folder = Path(databases)
        self._sandbox = Sandbox(SandboxLimits(timeout_s=timeout_s, memory_bytes=2 << 30))
        self._accepted = lru_cache(maxsize=1024)(self._rows)

    def __call__(self, trajectory: Trajectory) -> float:
        """The match; DataError where the accepted query fails, which is not the policy's fault."""
        task = trajectory.task
        database, gold = database_of(task, self._folder), task.answers[0]
        wanted = self._accepted(database, gold)
        if isinstance(wanted, str):
            raise DataError(f"task {task.id}: the accepted query fails: {wanted}")
        if trajectory.answer is None:
            return 0.0
        found = self._rows(database, unfenced(trajectory.answer))
        if isinstance(found, str):
            return 0.0
        return float(rows_match(found, wanted, ordered=is_ordered(gold)))

    def _rows(self, database: Path, sql: str) -> list[tuple[Any, ...]] | str:
        """All rows of a query, or why there are none."""
        try:
            found = self._sandbox.query(database, sql, max_rows=MATCH_ROWS, max_bytes=MATCH_BYTES)
        except ToolRefusedError as error:
            return str(error)
        if "error" in found:
            return str(found["error"])
        if found["more"]:
            return f"more than {MATCH_ROWS} rows or {MATCH_BYTES} bytes"
        return [tuple(map(_comparable, row)) for row in found["rows"]]

    def close(self) -> None:
        """End the sandbox's processes."""
        self._sandbox.close()


def rows_match(
    found: Sequence[tuple[Any, ...]], wanted: Sequence[tuple[Any, ...]], *, ordered: bool
) -> bool:
    """Whether two results are equal as BIRD compares them: as sets of rows.

    Rows are equal value by value: NULL equals NULL, 1 equals 1.0, floats have to agree in every
    digit, text by letter and case; columns go by place and not by name. How often a row comes does
    not count. Departs from BIRD where the accepted query is `ordered`: then the rows have to come
    in its order, and as often.
    """
    return list(found) == list(wanted) if ordered else set(found) == set(wanted)


def is_ordered(sql: str) -> bool:
    """Whether the outermost query has an ORDER BY."""
    text, depth = _QUOTED.sub(" ", sql), 0
    outer = []
    for character in text:
        depth += (character == "(") - (character == ")")
        outer.append(character if depth == 0 else " ")
    return re.search(r"\border\s+by\b", "".join(outer), re.IGNORECASE) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryFilter:
    """Leaves trajectories out of loss and baseline; the word in `process/left_out/<word>` says why.

    They leave as those whose tools broke: the policy is neither blamed nor praised for them.
    """

    unfinished: bool = True
    """No answer before the last turn or token."""
    no_query: bool = True
    """An answer without a query that ran."""
    unreadable: bool = False
    """A call that could not be read, or named no tool; SQL that is wrong is not that."""

    def __call__(
        self, trajectories: Sequence[Trajectory], policy: PolicyAccess
    ) -> list[Trajectory]:
        """The trajectories, some of them left out."""
        return [
            replace(t, unscored=reason)
            if not t.failed_outside_policy and (reason := self.reason(t))
            else t
            for t in trajectories
        ]

    def reason(self, trajectory: Trajectory) -> str | None:
        """Why it leaves; None if it stays."""
        calls = [call for turn in trajectory.turns for call in turn.calls]
        if self.unreadable and any(not call.valid for call in calls):
            return "unreadable"
        if self.unfinished and trajectory.stop is not StopReason.ANSWER:
            return "unfinished"
        if self.no_query and not any(call.outcome is Outcome.OK for call in calls):
            return "no_query"
        return None


def database_of(task: Task, folder: Path) -> Path:
    """The file that a task names; ToolError if it names none below the folder."""
    try:
        return resolve_inside([folder], str(task.metadata.get("database", "")), where=task.id)
    except DataError as error:
        raise ToolError(f"sql_tool: {error}") from error


def unfenced(answer: str) -> str:
    """A query without the Markdown around it."""
    fenced = _FENCE.match(answer.strip())
    return fenced[1] if fenced else answer.strip()


def _comparable(value: Any) -> Any:
    return bytes.fromhex(value["hex"]) if isinstance(value, dict) else value


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return f"x'{value['hex']}'"
    return "NULL" if value is None else str(value)


def _listing(folder: Path) -> str:
    """Digest of the names and sizes below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = "\n".join(f"{path.relative_to(folder)} {path.stat().st_size}" for path in files)
    return hashlib.sha256(names.encode()).hexdigest()[:16]
