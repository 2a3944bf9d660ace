"""Text to SQL: what a query may do, when two results are equal, which attempts are left out."""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from test_rewards import trajectory

from tapo_train.data.tasks import load_tasks
from tapo_train.errors import DataError, ToolArgumentError, ToolError, ToolRefusedError
from tapo_train.systems.invented_databases import write_databases
from tapo_train.systems.mtir_sql import (
    ExecutionMatch,
    SqlArguments,
    SqlTool,
    TrajectoryFilter,
    is_ordered,
    rows_match,
)
from tapo_train.tools.base import ToolContext
from tapo_train.types import (
    Observation,
    Outcome,
    Span,
    StopReason,
    Task,
    ToolCall,
    Trajectory,
    Turn,
)

ROWS = [("a", 1, 0.5), ("b", 2, None), ("b", 2, None), ("ünï", 3, 1e300)]
TASK = Task(
    id="t", question="?", images=(), answers=("SELECT n FROM t",), metadata={"database": "d.db"}
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of one table, and one that lies outside the folder."""
    folder = tmp_path_factory.mktemp("sql") / "databases"
    folder.mkdir()
    for path in (folder / "d.db", folder.parent / "outside.db"):
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE t (name TEXT, n INTEGER, x REAL)")
            connection.executemany("INSERT INTO t VALUES (?, ?, ?)", ROWS)
            connection.commit()
    return folder


@pytest.fixture(scope="module")
def tool(folder: Path) -> Iterator[SqlTool]:
    tool = SqlTool(str(folder), max_rows=3, max_bytes=300, timeout_s=1.0)
    yield tool
    tool.close()


@pytest.fixture(scope="module")
def match(folder: Path) -> Iterator[ExecutionMatch]:
    match = ExecutionMatch(str(folder), timeout_s=5.0)
    yield match
    match.close()


def answered(answer: str | None, task: Task) -> Trajectory:
    return replace(trajectory("ends"), answer=answer, task=task)


def ask(tool: SqlTool, sql: str, task: Task = TASK) -> str:
    context = ToolContext(images=(), task=task)
    return asyncio.run(tool.run(SqlArguments(sql=sql), context)).text


def test_a_query_shows_names_and_rows_and_says_that_there_are_more(tool: SqlTool) -> None:
    assert ask(tool, "SELECT name, n, x FROM t WHERE n < 3") == (
        "name | n | x\na | 1 | 0.5\nb | 2 | NULL\nb | 2 | NULL"
    )
    assert ask(tool, "SELECT n FROM t") == "n\n1\n2\n2\n…"
    assert ask(tool, "SELECT x'00ff' AS raw, 'ü' AS u") == "raw | u\nx'00ff' | ü"
    assert ask(tool, "SELECT name FROM sqlite_master") == "name\nt"
    with_table = "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM c WHERE i<3)"
    assert ask(tool, f"{with_table} SELECT max(i) FROM c") == "max(i)\n3"
    assert ask(tool, "SELECT printf('%200s', 'a'), printf('%200s', 'b') FROM t").endswith("…")


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO t VALUES ('c', 4, 1)",
        "DROP TABLE t",
        "CREATE TABLE u (a)",
        "CREATE TEMP TABLE u (a)",
        "ATTACH DATABASE '/tmp/other.db' AS other",
        "PRAGMA query_only = 0",
        "SELECT load_extension('x')",
        "VACUUM INTO '/tmp/stolen.db'",
        "BEGIN",
        "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM c) SELECT count(*) FROM c",
        "SELECT count(*) FROM t a, t b, t c, t d, t e, t f, t g, t h, t i, t j, t k, t l, t m, t n",
        "SELECT hex(zeroblob(100000000))",
        "SELECT n FROM t; SELECT n FROM t",
        "SELECT nothing FROM t",
        "SELEKT",
        "-- nothing",
        "SELECT 1\x00",
    ],
)
def test_what_is_not_a_query_that_reads_in_time_is_said_to_the_policy(
    tool: SqlTool, folder: Path, sql: str
) -> None:
    before = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir()}
    with pytest.raises((ToolArgumentError, ToolRefusedError)):
        ask(tool, sql)
    after = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir()}
    assert before == after
    assert ask(tool, "SELECT 1") == "1\n1"


@pytest.mark.parametrize(
    ("sql", "kind"), [("DROP TABLE t", ToolRefusedError), ("SELECT a FROM t", ToolArgumentError)]
)
def test_who_writes_is_refused_and_who_errs_is_blamed(
    tool: SqlTool, sql: str, kind: type[Exception]
) -> None:
    with pytest.raises(ToolError) as caught:
        ask(tool, sql)
    assert type(caught.value) is kind


@pytest.mark.parametrize("name", ["../outside.db", "missing.db", ""])
def test_no_task_reaches_a_file_outside_the_folder(tool: SqlTool, name: str) -> None:
    with pytest.raises(ToolError, match="sql_tool"):
        ask(tool, "SELECT 1", replace(TASK, metadata={"database": name}))


def test_results_are_equal_as_sets_of_rows_unless_an_order_is_asked_for() -> None:
    rows = [(1, None), (2, "b")]
    assert rows_match([(2, "b"), (1, None), (2, "b")], rows, ordered=False)
    assert rows_match([(1.0, None), (2, "b")], rows, ordered=False)
    assert not rows_match([(1, None)], rows, ordered=False)
    assert not rows_match([(1, ""), (2, "b")], rows, ordered=False)
    assert not rows_match([("b", 2), (None, 1)], rows, ordered=False)
    assert not rows_match([(0.1 + 0.2,)], [(0.3,)], ordered=False)
    assert rows_match(rows, rows, ordered=True)
    assert not rows_match(rows[::-1], rows, ordered=True)


@pytest.mark.parametrize(
    ("sql", "ordered"),
    [
        ("SELECT a FROM t ORDER  BY a", True),
        ("select a from t order\nby a limit 1", True),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a)", False),
        ("SELECT row_number() OVER (ORDER BY a) FROM t", False),
        ("SELECT a FROM t WHERE b = 'order by (' -- order by", False),
        ("SELECT '(' , a FROM t ORDER BY a", True),
        ("SELECT border by FROM t", False),
    ],
)
def test_only_the_outermost_order_by_counts(sql: str, ordered: bool) -> None:
    assert is_ordered(sql) is ordered


@pytest.mark.parametrize(
    ("gold", "answer", "worth"),
    [
        ("SELECT n FROM t", "SELECT n FROM t ORDER BY n DESC", 1.0),
        ("SELECT n FROM t", "SELECT DISTINCT n FROM t", 1.0),
        ("SELECT n FROM t", "```sql\nSELECT n AS m FROM t;\n```", 1.0),
        ("SELECT x FROM t WHERE n = 2", "SELECT NULL", 1.0),
        ("SELECT n FROM t ORDER BY n", "SELECT n FROM t ORDER BY n DESC", 0.0),
        ("SELECT n FROM t", "SELECT n FROM t WHERE n < 3", 0.0),
        ("SELECT n FROM t", "SELECT name FROM t", 0.0),
        ("SELECT n FROM t", "I do not know", 0.0),
        ("SELECT n FROM t", "DROP TABLE t", 0.0),
        ("SELECT n FROM t", None, 0.0),
    ],
)
def test_an_answer_is_right_if_its_query_finds_what_the_accepted_one_finds(
    match: ExecutionMatch, gold: str, answer: str | None, worth: float
) -> None:
    assert match(answered(answer, replace(TASK, answers=(gold,)))) == worth


def test_an_accepted_query_that_fails_is_no_fault_of_the_policy(match: ExecutionMatch) -> None:
    task = replace(TASK, answers=("SELECT missing FROM t",))
    with pytest.raises(DataError, match="no such column"):
        match(answered("SELECT 1", task))


def attempt(*outcomes: Outcome, valid: bool = True, stop: StopReason) -> Trajectory:
    """One turn with calls that ended so, and how the attempt ended."""
    calls = tuple(
        ToolCall(
            name="sql_tool",
            arguments={},
            valid=valid,
            executed=True,
            observation=Observation(text="", outcome=outcome),
        )
        for outcome in outcomes
    )
    turn = Turn(index=0, span=Span(start=1, end=2), text="", calls=calls)
    return replace(trajectory("ends"), turns=(turn,), stop=stop)


def test_the_filter_says_why_a_trajectory_is_left_out() -> None:
    ran = attempt(Outcome.MODEL_ERROR, Outcome.OK, stop=StopReason.ANSWER)
    wrong = attempt(Outcome.MODEL_ERROR, valid=False, stop=StopReason.ANSWER)
    cut = attempt(Outcome.OK, stop=StopReason.MAX_TURNS)
    usual, strict = TrajectoryFilter(), TrajectoryFilter(unreadable=True, unfinished=False)
    assert [usual.reason(t) for t in (ran, wrong, cut)] == [None, "no_query", "unfinished"]
    assert [strict.reason(t) for t in (ran, wrong, cut)] == [None, "unreadable", None]


def test_invented_questions_have_an_answer_and_right_queries_match_themselves(
    tmp_path: Path,
) -> None:
    write_databases(tmp_path, 5, train=2, validation=1)
    tasks = load_tasks(tmp_path / "train.jsonl")
    assert {task.metadata["database"] for task in tasks} == {"train0.sqlite", "train1.sqlite"}
    assert len(tasks) >= 10
    with closing(ExecutionMatch(str(tmp_path / "databases"))) as match:
        for task in tasks:
            assert match(answered(task.answers[0], task)) == 1.0
            assert match(answered("SELECT 'none of it'", task)) == 0.0
    again = tmp_path / "again"
    write_databases(again, 5, train=2, validation=1)
    assert (again / "train.jsonl").read_text() == (tmp_path / "train.jsonl").read_text()
