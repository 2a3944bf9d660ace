"""Opening what strangers sent, in a process that has little and can be killed.

A picture goes in as bytes and comes out as a freshly encoded PNG; a page comes out as text.
Size and format are checked before anything is unpacked. Memory, time and what may be
written are limited; when the worker dies or takes too long, that input is refused and
the next one gets a new worker.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tapo_train.data.images import FORMATS
from tapo_train.errors import ToolDownError, ToolRefusedError
from tapo_train.tools.images import image_from_bytes
from tapo_train.tools.sandbox_worker import PAGE, PICTURE, READY, REFUSED, REPLY, REQUEST
from tapo_train.types import Image

__all__ = ["Sandbox", "SandboxLimits"]

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
    """One worker process, started when first needed; safe to use from threads, one at a time."""

    def __init__(self, limits: SandboxLimits | None = None) -> None:
        self.limits = limits or SandboxLimits()
        self.counts: Counter[str] = Counter()
        """How many inputs were done, refused, or cost the worker its life (killed)."""
        self._lock = threading.Lock()
        self._worker: tuple[subprocess.Popen[bytes], socket.socket] | None = None

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

    def close(self) -> None:
        """End the worker; a later call starts another."""
        with self._lock:
            self._kill()

    def _ask(self, kind: int, limit: int, data: bytes) -> tuple[int, int, bytes]:
        """Width, height and bytes of the answer."""
        request = REQUEST.pack(kind, limit, len(data)) + data
        most = 4 * limit * limit + _OVERHEAD if kind == PICTURE else 4 * (limit + _OVERHEAD)
        with self._lock:
            self._start()
            try:
                status, width, height, said = self._exchange(request, most)
            except OSError as error:  # timeouts among them
                self._kill()
                self.counts["killed"] += 1
                limit_s = self.limits.timeout_s
                slow = f"took more than {limit_s} s"
                reason = slow if isinstance(error, TimeoutError) else "ended the process that did"
                raise ToolRefusedError(f"opening it {reason}") from error
        if status == REFUSED:
            self._refuse(said.decode("utf-8", "replace"))
        self.counts["done"] += 1
        return width, height, said

    def _exchange(self, request: bytes, most: int) -> tuple[int, int, int, bytes]:
        assert self._worker is not None
        channel = self._worker[1]
        deadline = time.monotonic() + self.limits.timeout_s
        channel.settimeout(self.limits.timeout_s)
        channel.sendall(request)
        status, width, height, length = REPLY.unpack(_receive(channel, REPLY.size, deadline))
        if length > most:
            raise ConnectionAbortedError(f"the worker announces {length} bytes")
        return status, width, height, _receive(channel, length, deadline)

    def _start(self) -> None:
        """Have a worker that lives. That there is none is no fault of what it would open."""
        if self._worker is not None and self._worker[0].poll() is not None:
            self._kill()  # it died between two inputs: neither's fault
        if self._worker is None:
            try:
                self._worker = self._started()
                _receive(self._worker[1], len(READY), time.monotonic() + _START_S)
            except OSError as error:
                self._kill()
                raise ToolDownError(f"the sandbox does not start: {error}") from error

    def _started(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        ours, theirs = socket.socketpair()
        limits = self.limits
        numbers = (limits.memory_bytes, limits.max_bytes, limits.max_pixels, limits.max_side)
        # Of this process's environment, which may hold keys, it gets only where programs are.
        environment = {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": str(_PACKAGE_PARENT)}
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "tapo_train.tools.sandbox_worker", *map(str, numbers)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment | threads,
                start_new_session=True,
            )
        return process, ours

    def _kill(self) -> None:
        if self._worker is not None:
            process, channel = self._worker
            self._worker = None
            channel.close()
            process.kill()
            process.wait()

    def _require_bytes(self, data: bytes, what: str) -> None:
        if len(data) > self.limits.max_bytes:
            self._refuse(f"a {what} of {len(data)} bytes; at most {self.limits.max_bytes}")

    def _refuse(self, reason: str) -> None:
        self.counts["refused"] += 1
        raise ToolRefusedError(reason)


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
