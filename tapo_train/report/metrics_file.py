"""metrics.jsonl: one JSON object per row, flushed; never a step twice, `kill -9` included.

A killed run may leave a torn last line and rows after its last checkpoint. Opening the
file to resume drops both, so the steps that are done again are logged once.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

from tapo_train.data.rows import parse_json, read_file, shown
from tapo_train.errors import DataError, TapoError
from tapo_train.report.files import naming, write_atomically

__all__ = ["MetricsFile", "read_metrics"]

Row = dict[str, float]


class MetricsFile:
    """A sink that appends rows to `path`.

    Args:
        path: The file; made if it is not there.
        resume_step: First step this process will do; rows from it on are dropped.
    """

    def __init__(self, path: Path, *, resume_step: int = 0) -> None:
        kept = [row for row in read_metrics(path) if row["step"] < resume_step]
        write_atomically(path, "".join(_line(row) for row in kept))
        self._path = path
        self._stream = path.open("a", encoding="utf-8")
        self._last_step = resume_step - 1
        self._names: set[str] = set()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one row with `step` and `time` (seconds since 1970).

        A step may come in several rows (training, then validation) if no metric comes
        twice. Values that are not finite are stored as null, since JSON has no NaN.
        """
        twice = sorted(self._names & set(metrics)) if step == self._last_step else []
        if step < self._last_step or twice:
            raise TapoError(
                f"metrics {twice or sorted(metrics)} of step {step} were logged before; "
                f"the last step logged is {self._last_step}"
            )
        self._names = (self._names if step == self._last_step else set()) | set(metrics)
        self._last_step = step
        with naming(self._path):
            self._stream.write(_line({"step": step, "time": round(time.time(), 3), **metrics}))
            self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def _line(row: Mapping[str, float]) -> str:
    finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[Row]:
    """All rows in order; none if there is no file. Null becomes NaN.

    Raises:
        DataError: a line other than the last is not a row. A torn last line is what a
            killed run leaves, and is left out.
    """
    if not path.exists():
        return []
    lines = [line for line in read_file(path).split(b"\n") if line.strip()]
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(_row(line, where=f"{path}:{number}"))
        except DataError:
            if number < len(lines):
                raise
    return rows


def _row(line: bytes, *, where: str) -> Row:
    value = parse_json(line, where=where)
    if not isinstance(value, dict) or not isinstance(value.get("step"), int):
        raise DataError(f"{where}: found {shown(value)}; wanted an object with an integer step")
    return {name: math.nan if entry is None else entry for name, entry in value.items()}
