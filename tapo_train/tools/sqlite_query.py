"""One SQL query over a database that it can read and nothing else; run in the sandbox's worker.

    {"database": path, "sql": text, "max_rows": n, "max_bytes": n, "timeout_s": s}
      →  {"columns": [name], "rows": [[value]], "more": bool} or {"error": text, "refused": bool}

The file is opened read-only and immutable, so nothing is locked or written, a journal included. An
authorizer lets a query select, read columns, recurse and call functions; what would attach, write,
or change settings is refused before it runs. A value of bytes is {"hex": text}.
"""

from __future__ import annotations

import json
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

__all__ = ["answer_query"]

ALLOWED = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
}
FORBIDDEN_FUNCTIONS = frozenset({"load_extension", "fts3_tokenizer", "readfile", "writefile"})
OPCODES_BETWEEN_LOOKS = 10_000
"""Of sqlite's machine; some tenths of a millisecond."""
SQL_BYTES = 20_000
"""Longest query."""


def answer_query(request: bytes) -> bytes:
    """The answer to a request, both as the module says, in JSON."""
    asked = json.loads(request)
    path = Path(asked["database"])
    try:
        with closing(_open(path, asked["max_bytes"], asked["timeout_s"])) as connection:
            found = _rows(connection, asked["sql"], asked["max_rows"], asked["max_bytes"])
    except sqlite3.DatabaseError as error:
        refused = "not authorized" in str(error) or "prohibited" in str(error)
        found = {"error": _in_words(error), "refused": refused}
    except (sqlite3.Warning, ValueError, OverflowError) as error:  # two statements, a NUL
        found = {"error": str(error), "refused": False}
    return json.dumps(found).encode()


def _open(path: Path, max_bytes: int, timeout_s: float) -> sqlite3.Connection:
    uri = f"file:{quote(str(path.resolve()))}?mode=ro&immutable=1"
    connection = sqlite3.connect(uri, uri=True)
    connection.text_factory = lambda data: data.decode(errors="replace")
    connection.execute("PRAGMA temp_store = MEMORY")
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, max_bytes)
    connection.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, SQL_BYTES)
    connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    until = time.monotonic() + timeout_s
    connection.set_progress_handler(lambda: time.monotonic() > until, OPCODES_BETWEEN_LOOKS)
    connection.set_authorizer(_authorize)
    return connection


def _authorize(action: int, first: str | None, second: str | None, *_: object) -> int:
    """Of a function, its name is the second."""
    is_allowed = action in ALLOWED and not (
        action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in FORBIDDEN_FUNCTIONS
    )
    return sqlite3.SQLITE_OK if is_allowed else sqlite3.SQLITE_DENY


def _rows(
    connection: sqlite3.Connection, sql: str, max_rows: int, max_bytes: int
) -> dict[str, Any]:
    cursor = connection.execute(sql)
    if cursor.description is None:
        return {"error": "it is no query: it selects nothing", "refused": False}
    rows: list[list[Any]] = []
    left = max_bytes
    for row in cursor:
        values = [_plain(value) for value in row]
        left -= len(json.dumps(values))
        if len(rows) == max_rows or left < 0:
            return {"columns": _columns(cursor), "rows": rows, "more": True}
        rows.append(values)
    return {"columns": _columns(cursor), "rows": rows, "more": False}


def _columns(cursor: sqlite3.Cursor) -> list[str]:
    return [column[0] for column in cursor.description]


def _plain(value: Any) -> Any:
    return {"hex": value.hex()} if isinstance(value, bytes) else value


def _in_words(error: sqlite3.DatabaseError) -> str:
    return "it took too long" if "interrupted" in str(error) else str(error)
