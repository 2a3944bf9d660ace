"""Tool answers on disk: a sqlite file in WAL mode and pictures named by their content.

Any number of processes of one machine may write at once; of two answers to the same call the
first one counts, for everybody. Not for network file systems, where WAL does not work.
Kept is what a policy may read: answers, and what the tool or a guard said no to. A back end
that was down or too slow is no answer: that call is asked again another time.

    recording/calls.sqlite     one row per call: key, tool, version, arguments, outcome, text
    recording/blobs/ab/ab12…   encoded pictures
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sqlite3
import threading
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Json, StrictStr, ValidationError

from tapo_train.data.images import read_image
from tapo_train.errors import ConfigError, DataError, ReplayMissError
from tapo_train.tools.base import CallName
from tapo_train.tools.threads import THREADS
from tapo_train.types import Image, ImageRef, Observation, Outcome

__all__ = ["Mode", "Recording", "Replay"]

Mode = Literal["record", "replay", "replay_or_record"]
"""record: ask the tool each time; the first answer to a call is everybody's. replay: answer from
the recording; a call that is not there ends the run. replay_or_record: answer from the recording,
ask and record what is not there."""

_FORMAT = 1
"""`user_version` of the file."""
_BUSY_S = 60.0
"""[s] a process waits for another one's write."""
_TABLE = """
create table if not exists calls (
    key text primary key, tool text not null, version text not null, arguments text not null,
    outcome text not null, text text not null, images text not null
) without rowid
"""


class _Picture(BaseModel):
    """A picture of an answer, as a row describes it."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    sha256: str
    width: int
    height: int
    root: str
    box: tuple[float, float, float, float]


class _Row(BaseModel):
    """An answer as it is recorded; a recording may be a stranger's."""

    outcome: Outcome
    text: StrictStr
    images: Json[tuple[_Picture, ...]]


@dataclass(frozen=True, slots=True)
class Replay:
    """What a recording does for the calls of a run."""

    recording: Recording
    mode: Mode

    async def known(self, call: CallName) -> Observation | None:
        """The recorded answer, which is free; None if the tool is to be asked.

        Raises:
            ReplayMissError: in a strict replay, the call was not recorded.
        """
        if self.mode == "record":
            return None
        loop = asyncio.get_running_loop()
        known = await loop.run_in_executor(THREADS, self.recording.get, call.key)
        if known is None and self.mode == "replay":
            raise ReplayMissError(
                f"tools.replay=replay: {call.tool} {call.arguments[:500]} (version {call.version}) "
                f"is not among the {len(self.recording)} calls of {self.recording.folder}; wanted "
                "a run that takes the recorded one's course. replay_or_record asks the tool instead"
            )
        return known

    async def keep(self, call: CallName, answer: Observation) -> Observation:
        """Record an answer; the one that counts, which may be an earlier one."""
        if answer.outcome in (Outcome.INFRA_ERROR, Outcome.TIMEOUT):
            return answer
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(THREADS, self.recording.put, call, answer)


class Recording:
    """The answers in one folder; safe to use from threads and from several processes.

    Args:
        folder: made if it is not there, unless `must_exist`.
        must_exist: for a replay, which has nothing to say without one.

    Raises:
        ConfigError: there is no recording, or what is there is something else.
    """

    def __init__(self, folder: Path, *, must_exist: bool = False) -> None:
        self.folder = folder
        self._blobs = folder / "blobs"
        self._lock = threading.Lock()
        self._path = path = folder / "calls.sqlite"
        if must_exist and not path.is_file():
            raise ConfigError(
                f"tools.recording: found no {path}; wanted what tools.replay=record wrote"
            )
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._file = _opened(path)
        except sqlite3.Error as error:
            raise ConfigError(f"tools.recording: {path} cannot be used: {error}") from error

    def __len__(self) -> int:
        with self._lock:
            count: int = self._file.execute("select count(*) from calls").fetchone()[0]
        return count

    def get(self, key: str) -> Observation | None:
        """The recorded answer, marked as cached; None if there is none.

        Raises:
            ReplayMissError: what is recorded is no answer, or a picture of it is gone or damaged.
        """
        try:
            with self._lock:
                row = self._file.execute(
                    "select outcome, text, images from calls where key = ?", (key,)
                ).fetchone()
            if row is None:
                return None
            written = _Row(outcome=row[0], text=row[1], images=row[2])
            images = tuple(self._image(described) for described in written.images)
        except (sqlite3.Error, ValidationError, DataError) as error:
            raise ReplayMissError(
                f"{self._path}: the answer to {key} cannot be used: {_in_one_line(error)}"
            ) from error
        return Observation(text=written.text, images=images, outcome=written.outcome, cached=True)

    def put(self, call: CallName, observation: Observation) -> Observation:
        """Keep an answer unless there is one already; the one that counts from now on."""
        for image in observation.images:
            self._keep(image)
        images = json.dumps([_described(image) for image in observation.images])
        said = (observation.outcome.value, observation.text, images)
        row = (call.key, call.tool, call.version, call.arguments, *said)
        with self._lock:
            done = self._file.execute("insert or ignore into calls values (?,?,?,?,?,?,?)", row)
            is_first = done.rowcount == 1
        earlier = None if is_first else self.get(call.key)
        # Not cached: the tool was asked for this one, and paid.
        return observation if earlier is None else replace(earlier, cached=False)

    def close(self) -> None:
        """Close the file; the last process to do so folds the log into it."""
        with self._lock:
            self._file.close()

    def _keep(self, image: Image) -> None:
        path = self._blob(image.sha256)
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
        partial.write_bytes(image.data)
        partial.replace(path)

    def _image(self, described: _Picture) -> Image:
        path = self._blob(described.sha256)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"the recording's picture {path} cannot be read: {error}") from error
        if hashlib.sha256(data).hexdigest() != described.sha256:
            raise DataError(f"the recording's picture {path} is damaged: its digest differs")
        found = read_image(data, where=f"the recording's picture {path}")
        if (found.width, found.height) != (described.width, described.height):
            raise DataError(
                f"the recording's picture {path} has {found.width} x {found.height} pixels; "
                f"the row says {described.width} x {described.height}"
            )
        return replace(found, ref=ImageRef(root=described.root, box=described.box))

    def _blob(self, sha256: str) -> Path:
        # The name comes from a file that may be a stranger's.
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise DataError(f"the recording names a picture {sha256[:80]!r}; wanted a digest")
        return self._blobs / sha256[:2] / sha256


def _described(image: Image) -> dict[str, Any]:
    return {
        "sha256": image.sha256,
        "width": image.width,
        "height": image.height,
        "root": image.ref.root,
        "box": list(image.ref.box),
    }


def _in_one_line(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _opened(path: Path) -> sqlite3.Connection:
    """A connection in WAL mode; sqlite3.Error if the file is no recording."""
    file = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        _use_wal(file)
        file.execute("pragma synchronous = normal")
        found = file.execute("pragma user_version").fetchone()[0]
        if found not in (0, _FORMAT):
            raise sqlite3.DatabaseError(f"its format is {found}; this version knows {_FORMAT}")
        file.execute(_TABLE)
        file.execute(f"pragma user_version = {_FORMAT}")
        with closing(file.execute("select key, tool, outcome, text, images from calls limit 0")):
            return file
    except sqlite3.Error:
        file.close()
        raise


def _use_wal(file: sqlite3.Connection) -> None:
    """Switch the log on; while another process does the same, sqlite does not wait by itself."""
    deadline = time.monotonic() + _BUSY_S
    while True:
        try:
            file.execute("pragma journal_mode = wal")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
