"""The trainer's end of one engine server: connect, read, reconnect.

A thread reads frames and puts them on a queue for the engine's thread, which alone decides
what they mean. A connection that broke is tried again for as long as the run lasts; what
the server said through the old one is told apart by its channel.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from urllib.parse import urlsplit

from tapo_train.errors import ConfigError, EngineLostError
from tapo_train.rollout.remote.listener import Served
from tapo_train.rollout.remote.messages import (
    Alive,
    Challenge,
    Hello,
    PolicyId,
    Refused,
    ServerMessage,
    Welcome,
    header,
    read_server,
)
from tapo_train.rollout.remote.wire import (
    PROTOCOL,
    Channel,
    Frame,
    is_proof,
    new_nonce,
    proof,
    start_thread,
)

FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 5.0
"""Between two attempts to connect; doubled each time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something a server said, or None: its connection is gone."""

    link: ServerLink
    channel: Channel
    message: ServerMessage | None
    body: bytearray


@dataclass(slots=True, eq=False)
class ServerLink:
    """One server as this trainer knows it.

    The engine's thread owns `channel`, `policy`, `load` and `sent`; the reading thread
    only `problem`, `served` and `is_refused`.
    """

    url: str
    secret: bytes = field(repr=False)
    timeout_s: float
    events: SimpleQueue[Event]
    channel: Channel | None = None
    """The connection requests go through; None while there is none."""
    policy: PolicyId | None = None
    """The weights it holds; None: not said yet."""
    load: int = 0
    """Requests in flight."""
    sent: set[str] = field(default_factory=set)
    """Pictures this server was given."""
    served: Served | None = None
    problem: str = "no connection yet"
    """Why there is no connection."""
    is_refused: bool = False
    """The server does not want us or talks nonsense, and asking again will not help."""
    _closing: threading.Event = field(default_factory=threading.Event)
    _reading: Channel | None = None

    def start(self) -> None:
        """Connect, and stay connected, in a thread."""
        start_thread(self._run, name=f"read {self.url}")

    def close(self) -> None:
        """Hang up for good."""
        self._closing.set()
        if self._reading is not None:
            self._reading.close()

    def forsake(self, problem: str) -> None:
        """Hang up for good on a server whose words make no sense."""
        self.close()
        self.problem, self.is_refused = f"{self.url}: {problem}", True

    def hang_up(self) -> None:
        """Break the connection; the thread connects again."""
        if self.channel is not None:
            self.channel.close()
        self.channel, self.policy, self.load = None, None, 0
        self.sent.clear()

    def _run(self) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._closing.is_set() and not self.is_refused:
            try:
                channel = self._connect()
                pause_s = FIRST_PAUSE_S
                self._read(channel)
            except EngineLostError as error:
                if not self._closing.is_set():
                    self.problem = str(error)
            self._closing.wait(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _connect(self) -> Channel:
        try:
            connection = socket.create_connection(address_of(self.url), timeout=self.timeout_s)
        except OSError as error:
            raise EngineLostError(f"{self.url}: cannot connect: {error}") from error
        channel = Channel(connection, peer=self.url)
        try:
            self._greet(channel)
        except EngineLostError:
            channel.close()
            raise
        channel.trust()
        return channel

    def _greet(self, channel: Channel) -> None:
        """Prove ourselves, and have the server prove itself."""
        challenge = read_server(channel.receive(), peer=self.url)
        if not isinstance(challenge, Challenge) or challenge.protocol != PROTOCOL:
            self.is_refused = True
            raise EngineLostError(f"{self.url}: not an engine server of protocol {PROTOCOL}")
        nonces = (challenge.nonce, new_nonce())
        mac = proof(self.secret, "client", *nonces)
        channel.send(header(Hello(nonce=nonces[1], mac=mac)))
        welcome = read_server(channel.receive(), peer=self.url)
        if isinstance(welcome, Refused):
            self.is_refused = True
            raise EngineLostError(f"{self.url}: the server refused us: {welcome.message}")
        if not isinstance(welcome, Welcome) or not is_proof(
            welcome.mac, self.secret, "server", *nonces
        ):
            self.is_refused = True
            raise EngineLostError(f"{self.url}: the server does not know the secret")
        self.served = Served(
            identity=welcome.identity, base=welcome.base, max_tokens=welcome.max_tokens
        )

    def _read(self, channel: Channel) -> None:
        self._reading = channel
        try:
            while not self._closing.is_set():
                frame = channel.receive()
                message = self._understood(frame)
                if isinstance(message, Refused):
                    raise EngineLostError(f"{self.url}: the server hung up: {message.message}")
                if not isinstance(message, Alive):
                    self._put(channel, message, frame.body)
                elif message.idle_s > self.timeout_s:
                    raise EngineLostError(
                        f"{self.url}: its engine hangs for {message.idle_s:.0f} s"
                    )
        finally:
            channel.close()
            self._put(channel, None, bytearray())

    def _understood(self, frame: Frame) -> ServerMessage:
        try:
            return read_server(frame, peer=self.url)
        except EngineLostError as error:
            self.problem, self.is_refused = str(error), True
            raise

    def _put(self, channel: Channel, message: ServerMessage | None, body: bytearray) -> None:
        self.events.put(Event(link=self, channel=channel, message=message, body=body))


def address_of(url: str) -> tuple[str, int]:
    """Host and port of `tcp://host:port`; ConfigError for anything else."""
    parts = urlsplit(url)
    if parts.scheme != "tcp" or not parts.hostname or not parts.port:
        raise ConfigError(f"rollout.engine.urls: found {url!r}, wanted tcp://host:port")
    return parts.hostname, parts.port


def servers_of_rank(urls: Sequence[str], rank: int, world_size: int) -> tuple[list[str], bool]:
    """The servers a rank asks, and whether it sends them the weights.

    With as many servers as ranks, each rank has its own; with fewer, ranks share them and
    the lowest rank of each sends for all.
    """
    if len(urls) >= world_size:
        return list(urls[rank::world_size]), True
    return [urls[rank % len(urls)]], rank < len(urls)
