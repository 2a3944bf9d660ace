"""Frames over a socket between a trainer and an engine process.

    4 bytes   length of the header
    8 bytes   length of the body
    header    one JSON object (`messages.py`)
    body      raw little-endian numbers, or an encoded picture; never a pickle

Both sides prove that they know the shared secret before anything else is read: each
answers the other's random challenge with an HMAC. The traffic itself is neither encrypted
nor signed, so a network with strangers on it needs a tunnel (docs/engines.md).
"""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from tapo_train.errors import ConfigError, EngineLostError

PROTOCOL = 1
SECRET_VARIABLE = "TAPO_ENGINE_SECRET"
SHORTEST_SECRET = 16
"""[characters]"""
HEADER_BYTES = 2**20
"""Longest header; the ids of a trajectory's pictures are most of it."""
BODY_BYTES = 64 * 2**20
"""Longest body: an encoded picture, a token list, or a slice of a tensor."""
STRANGER_BYTES = 1024
"""Longest header before the other side has proved itself; it may send no body."""

_LENGTHS = struct.Struct(">IQ")
_READ_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A header as it came, and the bytes that belong to it."""

    header: bytes
    body: bytearray


class Channel:
    """One connection: whole frames in, whole frames out.

    Sending is safe from several threads; receiving is for one.
    """

    def __init__(self, connection: socket.socket, *, peer: str) -> None:
        self._socket = connection
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._sending = threading.Lock()
        self._header_limit, self._body_limit = STRANGER_BYTES, 0
        self._deadline = math.inf
        self.peer = peer

    def trust(self) -> None:
        """Accept frames of full size from now on."""
        self._header_limit, self._body_limit = HEADER_BYTES, BODY_BYTES

    def set_timeout(self, seconds: float | None) -> None:
        """How long one read or write may take; None waits for ever."""
        self._deadline = math.inf
        self._socket.settimeout(seconds)

    def set_deadline(self, seconds: float) -> None:
        """How long all reads together may take, however slowly bytes drip in."""
        self.set_timeout(seconds)
        self._deadline = time.monotonic() + seconds

    def send(self, header: bytes, *body: bytes | memoryview) -> None:
        """Send one frame.

        Raises:
            EngineLostError: the connection is gone, or took too long.
        """
        lengths = _LENGTHS.pack(len(header), sum(len(part) for part in body))
        try:
            with self._sending:
                self._socket.sendall(lengths + header)
                for part in body:
                    self._socket.sendall(part)
        except (OSError, ValueError) as error:
            raise EngineLostError(f"{self.peer}: cannot send: {error}") from error

    def receive(self) -> Frame:
        """Wait for the next frame.

        Raises:
            EngineLostError: the connection ended, was silent for too long, or announced
                a frame over the limits.
        """
        header_length, body_length = _LENGTHS.unpack(bytes(self._read(_LENGTHS.size)))
        if header_length > self._header_limit or body_length > self._body_limit:
            raise EngineLostError(
                f"{self.peer}: announced a frame of {header_length} + {body_length} bytes; "
                f"wanted at most {self._header_limit} + {self._body_limit}"
            )
        return Frame(header=bytes(self._read(header_length)), body=self._read(body_length))

    def close(self) -> None:
        """End the connection; a thread that waits in `receive` gets an EngineLostError."""
        with suppress(OSError):  # The other side was faster.
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self, length: int) -> bytearray:
        """Exactly `length` bytes. Memory grows with what arrives, not with what is promised."""
        data = bytearray()
        try:
            while len(data) < length:
                if self._deadline < math.inf:
                    self._socket.settimeout(max(1e-3, self._deadline - time.monotonic()))
                part = self._socket.recv(min(length - len(data), _READ_BYTES))
                if not part:
                    raise EngineLostError(f"{self.peer}: the connection ended")
                data += part
        except TimeoutError as error:
            raise EngineLostError(f"{self.peer}: silent for too long") from error
        except (OSError, ValueError) as error:
            raise EngineLostError(f"{self.peer}: {error}") from error
        return data


def shared_secret() -> bytes:
    """The secret both sides are started with.

    Raises:
        ConfigError: it is not set, or too short to be one.
    """
    secret = os.environ.get(SECRET_VARIABLE, "")
    if len(secret) < SHORTEST_SECRET:
        raise ConfigError(
            f"{SECRET_VARIABLE}: found {len(secret)} characters in the environment, wanted the "
            f"secret that trainer and engine servers share, at least {SHORTEST_SECRET} long "
            "(for instance from `openssl rand -hex 32`)"
        )
    return secret.encode()


def new_nonce() -> str:
    """A challenge nobody has seen before."""
    return secrets.token_hex(32)


def proof(secret: bytes, side: str, *nonces: str) -> str:
    """What `side` ("server" or "client") answers to a pair of challenges."""
    return hmac.new(secret, "|".join((side, *nonces)).encode(), hashlib.sha256).hexdigest()


def is_proof(found: str, secret: bytes, side: str, *nonces: str) -> bool:
    """Whether `found` is the proof, compared in constant time."""
    return hmac.compare_digest(found.encode(), proof(secret, side, *nonces).encode())


def start_thread(work: Callable[[], None], *, name: str) -> threading.Thread:
    """A thread that does not keep the process alive."""
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    return thread
