"""The attempts of an evaluation on disk: one line each, appended when their question is over.

A killed evaluation leaves whole lines and perhaps one that is torn, which is cut off. `asked.json`
beside them says of what the attempts are; what is asked otherwise does not go on there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tapo_train.data.row_files import rows_of
from tapo_train.errors import ConfigError
from tapo_train.evaluation.attempt import Attempt, as_json, read_attempt

__all__ = ["AttemptsFile", "read_attempts"]

_ASKED = "asked.json"


class AttemptsFile:
    """Attempts in a folder; each of several processes appends to a file of its own.

    Args:
        asked: what makes attempts comparable: model, prompt, tools, repeats.

    Raises:
        ConfigError: the folder holds attempts that were asked for otherwise.
    """

    def __init__(self, folder: Path, *, asked: Mapping[str, Any], rank: int = 0) -> None:
        self.folder = folder
        self.path = folder / ("attempts.jsonl" if rank == 0 else f"attempts.rank_{rank}.jsonl")
        folder.mkdir(parents=True, exist_ok=True)
        note = folder / _ASKED
        if rank == 0 and not note.is_file():
            note.write_text(json.dumps(asked, indent=1, sort_keys=True), encoding="utf-8")
        _require_same(note, asked)
        _cut_torn_line(self.path)

    def held(self) -> list[Attempt]:
        """Those of all processes."""
        return read_attempts(self.folder)

    def append(self, attempts: Iterable[Attempt]) -> None:
        """Write, and hand to the operating system, before anything else is asked."""
        lines = "".join(json.dumps(as_json(attempt)) + "\n" for attempt in attempts)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(lines)
            stream.flush()
            os.fsync(stream.fileno())


def read_attempts(folder: Path) -> list[Attempt]:
    """The attempts in a folder, in the order of benchmark, task and repeat.

    Raises:
        DataError: a line is none.
    """
    files = sorted(folder.glob("attempts*.jsonl"))
    found = {
        (attempt.benchmark, attempt.task, attempt.repeat): attempt
        for file in files
        for _, _, read in rows_of(file)
        for attempt in [read_attempt(read())]
    }
    return [found[name] for name in sorted(found)]


def _require_same(note: Path, asked: Mapping[str, Any]) -> None:
    if not note.is_file():
        return  # another rank is about to write it
    before = json.loads(note.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(asked))
    changed = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    if changed:
        raise ConfigError(
            f"eval: --out {note.parent} holds attempts that were asked for otherwise ("
            f"{', '.join(f'{n}: {before.get(n)!r}, now {now.get(n)!r}' for n in changed)}); wanted "
            "another folder, or what they were asked for with"
        )


def _cut_torn_line(path: Path) -> None:
    if not path.is_file():
        return
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as stream:
            stream.truncate(len(whole))
