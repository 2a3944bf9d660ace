"""Opening what strangers sent, in a process that has little and can be killed.

A picture goes in as bytes and comes out as a freshly encoded PNG; a page comes out as text.
Size and format are checked before anything is unpacked. Memory, time and what may be
written are limited; when a worker dies or takes too long, that input is refused and
another one gets a new worker. Some workers open inputs side by side, or one slow input would
hold up the calls of every other trajectory.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tapo_train.data.images import FORMATS
from tapo_train.errors import DataError, ToolDownError, ToolRefusedError
from tapo_train.tools.images import image_from_bytes
from tapo_train.tools.sandbox_worker import (
    FRAMES,
    PAGE,
    PICTURE,
    QUERY,
    READY,
    REFUSED,
    REPLY,
    REQUEST,
)
from tapo_train.tools.threads import queueing
from tapo_train.tools.video_frames import pieces
from tapo_train.types import Image

__all__ = ["WORKERS", "Sandbox", "SandboxLimits"]

WORKERS = max(2, min(4, (os.cpu_count() or 2) // 4))
"""Opening is computing: more than a few would take the cores from the engine and its tools."""
_START_S = 60.0
"""[s] a new worker may need until it is ready, on a busy machine."""
_OVERHEAD = 65_536
"""[B] of an answer beside its pixels or characters."""
_MAGIC = {"PNG": b"\x89PNG\r\n\x1a\n", "JPEG": b"\xff\xd8\xff", "WEBP": b"RIFF"}
_PNG_SIZE = struct.Struct(">4s4sII")
"""Length and name of a PNG's first chunk, width, height; after the magic number."""
_PACKAGE_PARENT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxLimits:
    """What one input may cost."""

    max_bytes: int = 8 * 2**20
    """[B] of an encoded picture or of a page."""
    max_pixels: int = 25_000_000
    """width x height of a picture."""
    max_side: int = 16_384
    """[px] longest side of a picture."""
    timeout_s: float = 5.0
    """[s] for one input; then the worker is killed."""
    memory_bytes: int = 1 << 30
    """[B] address space of the worker; a picture of most pixels needs half of it."""


class Sandbox:
    """A few worker processes, started when needed; safe to use from threads.

    Args:
        workers: most inputs opened at a time; further ones wait.
    """

    def __init__(self, limits: SandboxLimits | None = None, *, workers: int = WORKERS) -> None:
        self.limits = limits or SandboxLimits()
        self.counts: Counter[str] = Counter()
        """How many inputs were done, refused, or cost the worker its life (killed)."""
        self._num_seats = workers
        self._seats = threading.Semaphore(workers)
        self._closing = threading.Lock()
        self._idle: list[_Worker] = []

    def picture(self, data: bytes, *, longest_px: int) -> Image:
        """The picture, reduced to `longest_px` and encoded anew; it is its own root.

        Of an animated file the first frame counts. Blocks; meant for `asyncio.to_thread`.

        Raises:
            ToolRefusedError: too large, too thin, damaged, or of a format not in FORMATS.
            ToolDownError: no worker can be started.
        """
        self._require_bytes(data, "picture")
        if not any(data.startswith(_MAGIC[name]) for name in FORMATS):
            self._refuse(f"a picture that is none of {', '.join(FORMATS)}")
        width, height, encoded = self._ask(PICTURE, longest_px, data)
        if max(width, height) > longest_px or not _is_png_of(encoded, width, height):
            self._refuse("the worker's answer is not the picture it was asked for")
        return image_from_bytes(encoded, width=width, height=height)

    def page(self, data: bytes, *, max_chars: int) -> str:
        """The words of an HTML page.

        Raises:
            ToolRefusedError: it is too large, or takes too long to read.
        """
        self._require_bytes(data, "page")
        return self._ask(PAGE, max_chars, data)[2].decode("utf-8", "replace")

    def query(self, database: Path, sql: str, *, max_rows: int, max_bytes: int) -> dict[str, Any]:
        """Rows of a query over a sqlite file, or why there are none; see `sqlite_query`.

        Args:
            max_rows, max_bytes: of the answer, as JSON; what is more is left out.

        Raises:
            ToolRefusedError: it takes too long, or too much memory.
        """
        asked = {"database": str(database), "sql": sql, "max_rows": max_rows}
        limits = {"max_bytes": max_bytes, "timeout_s": 0.8 * self.limits.timeout_s}
        request = json.dumps({**asked, **limits}).encode()
        self._require_bytes(request, "query")
        found: dict[str, Any] = json.loads(self._ask(QUERY, max_bytes, request)[2])
        return found

    def frames(
        self, video: Path, times_s: Sequence[float], *, longest_px: int
    ) -> tuple[float, list[tuple[float, Image]]]:
        """Duration of a video [s], and (time [s], frame) for each time; see `video_frames`.

        Raises:
            ToolRefusedError: it is none, damaged, or takes too long.
        """
        request = json.dumps({"video": str(video), "times_s": list(times_s)}).encode()
        answer = self._ask(FRAMES, longest_px, request, num=len(times_s))[2]
        try:
            duration_s, found = pieces(answer)
        except DataError as error:
            self._refuse(str(error))
        if len(found) != len(times_s) or not all(_is_png_of(p, w, h) for _, w, h, p in found):
            self._refuse("the worker's answer is not the frames it was asked for")
        return duration_s, [
            (time_s, image_from_bytes(png, width=width, height=height))
            for time_s, width, height, png in found
        ]

    def close(self) -> None:
        """End the workers, when they are done; a later call starts others. Tools may share it."""
        # One at a time: two that each held some of the seats would wait for each other's.
        with self._closing:
            for _ in range(self._num_seats):
                self._seats.acquire()
            while self._idle:
                self._idle.pop().kill()
            self._seats.release(self._num_seats)

    def _ask(self, kind: int, limit: int, data: bytes, *, num: int = 1) -> tuple[int, int, bytes]:
        """Width, height and bytes of the answer, which holds so many pictures."""
        request = REQUEST.pack(kind, limit, len(data)) + data
        of_pictures = num * 4 * limit * limit + _OVERHEAD
        most = of_pictures if kind in (PICTURE, FRAMES) else 4 * (limit + _OVERHEAD)
        with self._seat(), self._worker() as worker:
            try:
                status, width, height, said = worker.exchange(request, most, self.limits.timeout_s)
            except OSError as error:  # timeouts among them
                self.counts["killed"] += 1
                slow = f"took more than {self.limits.timeout_s} s"
                reason = slow if isinstance(error, TimeoutError) else "ended the process that did"
                raise ToolRefusedError(f"opening it {reason}") from error
        if status == REFUSED:
            self._refuse(said.decode("utf-8", "replace"))
        self.counts["done"] += 1
        return width, height, said

    @contextmanager
    def _seat(self) -> Iterator[None]:
        """One of the places for open inputs; waiting for it is no work of the call's."""
        with queueing():
            self._seats.acquire()
        try:
            yield
        finally:
            self._seats.release()

    @contextmanager
    def _worker(self) -> Iterator[_Worker]:
        """A worker that lives; none of the next inputs gets it unless the block succeeds."""
        worker = self._idle.pop() if self._idle else _Worker(self.limits)
        if not worker.is_alive:  # that it died between two inputs is neither's fault
            worker.kill()
            worker = _Worker(self.limits)
        is_sound = False
        try:
            yield worker
            is_sound = True
        finally:
            if is_sound:
                self._idle.append(worker)
            else:
                worker.kill()

    def _require_bytes(self, data: bytes, what: str) -> None:
        if len(data) > self.limits.max_bytes:
            self._refuse(f"a {what} of {len(data)} bytes; at most {self.limits.max_bytes}")

    def _refuse(self, reason: str) -> NoReturn:
        self.counts["refused"] += 1
        raise ToolRefusedError(reason)


class _Worker:
    """A process that opens one input at a time.

    Raises:
        ToolDownError: it does not start, which is no fault of what it would open.
    """

    def __init__(self, limits: SandboxLimits) -> None:
        self._channel, theirs = socket.socketpair()
        numbers = (limits.memory_bytes, limits.max_bytes, limits.max_pixels, limits.max_side)
        # Of this process's environment, which may hold keys, it gets only where programs are.
        environment = {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": str(_PACKAGE_PARENT)}
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "tapo_train.tools.sandbox_worker", *map(str, numbers)],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=environment | threads,
                    start_new_session=True,
                )
        except OSError as error:
            self._channel.close()
            raise ToolDownError(f"the sandbox does not start: {error}") from error
        try:
            _receive(self._channel, len(READY), time.monotonic() + _START_S)
        except OSError as error:
            self.kill()
            raise ToolDownError(f"the sandbox does not start: {error}") from error

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def exchange(self, request: bytes, most: int, timeout_s: float) -> tuple[int, int, int, bytes]:
        """Status, width, height and bytes; OSError if there is no answer of that form in time."""
        deadline = time.monotonic() + timeout_s
        self._channel.settimeout(timeout_s)
        self._channel.sendall(request)
        head = REPLY.unpack(_receive(self._channel, REPLY.size, deadline))
        status, width, height, length = head
        if length > most:
            raise ConnectionAbortedError(f"the worker announces {length} bytes")
        return status, width, height, _receive(self._channel, length, deadline)

    def kill(self) -> None:
        """End it, now."""
        self._channel.close()
        self._process.kill()
        self._process.wait()


def _receive(channel: socket.socket, length: int, deadline: float) -> bytes:
    """Exactly `length` bytes; TimeoutError after `deadline`, OSError if the worker is gone."""
    held = bytearray()
    while len(held) < length:
        channel.settimeout(max(0.001, deadline - time.monotonic()))
        piece = channel.recv(min(length - len(held), 1 << 20))
        if not piece:
            raise ConnectionResetError("the worker is gone")
        held += piece
    return bytes(held)


def _is_png_of(data: bytes, width: int, height: int) -> bool:
    """Whether the header says so: the worker may have been taken over by what it opened."""
    magic = _MAGIC["PNG"]
    if not data.startswith(magic) or len(data) < len(magic) + _PNG_SIZE.size:
        return False
    return _PNG_SIZE.unpack_from(data, len(magic))[1:] == (b"IHDR", width, height)
