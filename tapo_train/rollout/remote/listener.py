"""Who may talk to an engine process: connections in, clients that know the secret out."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from tapo_train.errors import ConfigError, EngineLostError
from tapo_train.rollout.remote.messages import (
    Challenge,
    Hello,
    Refused,
    Welcome,
    header,
    read_client,
)
from tapo_train.rollout.remote.wire import (
    PROTOCOL,
    Channel,
    is_proof,
    new_nonce,
    proof,
    start_thread,
)

GREETING_S = 10.0
"""How long a stranger may take over its introduction."""
PAUSE_S = 0.1
"""After a connection that could not be accepted; for instance too many files are open."""
MOST_CLIENTS = 256
"""Connections at a time, strangers included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a server says of itself."""

    identity: str
    """Digest of the chat format; clients with another one are not for this server."""
    base: str
    """Digest of the model folder's weights."""
    max_tokens: int
    """[tokens] longest sequence the engine takes."""


class Listener:
    """Accepts connections; a thread for each.

    Args:
        welcome: talks to a client that has proved itself, until it goes away.

    Raises:
        ConfigError: the address cannot be listened on.
    """

    def __init__(
        self,
        served: Served,
        *,
        secret: bytes,
        host: str,
        port: int,
        welcome: Callable[[Channel], None],
    ) -> None:
        self._served = served
        self._secret = secret
        self._welcome = welcome
        try:
            self._socket = socket.create_server((host, port))
        except (OSError, OverflowError) as error:  # OverflowError: no such port.
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error}; wanted a free port of this machine"
            ) from error
        self._seats = threading.BoundedSemaphore(MOST_CLIENTS)
        self._closed = threading.Event()
        self.address: tuple[str, int] = self._socket.getsockname()[:2]

    def start(self) -> None:
        """Accept in a thread."""
        start_thread(self._accept, name="accept")

    def close(self) -> None:
        """Accept no more, and free the port: shutting down wakes the thread that accepts."""
        self._closed.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                connection, address = self._socket.accept()
            except OSError:  # Closed, or a trouble that passes.
                self._closed.wait(PAUSE_S)
                continue
            if not self._seats.acquire(blocking=False):
                connection.close()
                continue
            channel = Channel(connection, peer=f"{address[0]}:{address[1]}")
            start_thread(partial(self._talk, channel), name=channel.peer)

    def _talk(self, channel: Channel) -> None:
        """One connection from its first word to its last."""
        try:
            channel.set_deadline(GREETING_S)
            self._greet(channel)
            channel.set_timeout(None)
            channel.trust()
            self._welcome(channel)
        except EngineLostError as error:
            print(f"refused: {error}", file=sys.stderr, flush=True)
        finally:
            channel.close()
            self._seats.release()

    def _greet(self, channel: Channel) -> None:
        nonce = new_nonce()
        channel.send(header(Challenge(protocol=PROTOCOL, nonce=nonce)))
        hello = read_client(channel.receive(), peer=channel.peer)
        if not isinstance(hello, Hello):
            raise EngineLostError(f"{channel.peer}: said {hello.op} before introducing itself")
        nonces = (nonce, hello.nonce)
        if not is_proof(hello.mac, self._secret, "client", *nonces):
            channel.send(header(Refused(message="wrong secret")))
            raise EngineLostError(f"{channel.peer}: wrong secret")
        welcome = Welcome(
            mac=proof(self._secret, "server", *nonces),
            identity=self._served.identity,
            base=self._served.base,
            max_tokens=self._served.max_tokens,
        )
        channel.send(header(welcome))
