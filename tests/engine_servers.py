"""Engine servers in threads of the test, and the two ends of a connection by hand."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.engine import Engine
from tapo_train.rollout.remote.carriers import StreamedWeights, WeightCarrier
from tapo_train.rollout.remote.engine import RemoteEngine
from tapo_train.rollout.remote.fleet import RemoteOptions
from tapo_train.rollout.remote.identity import chat_identity, weights_fingerprint
from tapo_train.rollout.remote.listener import Listener, Served
from tapo_train.rollout.remote.messages import (
    Challenge,
    Hello,
    Loaded,
    PolicyId,
    ServerMessage,
    Welcome,
    header,
    read_server,
)
from tapo_train.rollout.remote.payload import Expected
from tapo_train.rollout.remote.server import EngineServer
from tapo_train.rollout.remote.wire import Channel, new_nonce, proof

SECRET = b"sixteen letters."
WAIT_S = 10.0


def served_of(chat: ChatFormat, *, max_tokens: int = 4096) -> Served:
    """What a server of the chat's folder says of itself."""
    base = weights_fingerprint(chat.model)
    return Served(identity=chat_identity(chat), base=base, max_tokens=max_tokens)


def options_of(chat: ChatFormat, *, patience_s: float) -> RemoteOptions:
    """What a trainer with the chat's folder expects."""
    served = served_of(chat)
    return RemoteOptions(
        identity=served.identity,
        base=served.base,
        expected=Expected(chat),
        patience_s=patience_s,
    )


@contextmanager
def serving(
    engine: Engine, chat: ChatFormat, *, port: int = 0, **options: Any
) -> Iterator[EngineServer]:
    """A server around `engine`, in a thread."""
    max_tokens = options.pop("max_tokens", 4096)
    served = served_of(chat, max_tokens=max_tokens)
    server = EngineServer(engine, served, secret=SECRET, port=port, **options)
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(WAIT_S)
        until_connections_end()


def until_connections_end() -> None:
    """Wait a moment for what connections say at their end, so that it belongs to their test."""
    for thread in threading.enumerate():
        if thread.name.startswith("127.0.0.1:"):
            thread.join(0.3)


@contextmanager
def impostor(chat: ChatFormat, talk: Callable[[Channel], None]) -> Iterator[Listener]:
    """A server that knows the secret and then says whatever `talk` says."""
    listener = Listener(served_of(chat), secret=SECRET, host="127.0.0.1", port=0, welcome=talk)
    listener.start()
    try:
        yield listener
    finally:
        listener.close()
        until_connections_end()


@contextmanager
def trainer_of(
    servers: Sequence[EngineServer | Listener],
    chat: ChatFormat,
    *,
    carrier: WeightCarrier | None = None,
    secret: bytes = SECRET,
    **options: Any,
) -> Iterator[RemoteEngine]:
    """An engine that asks the servers."""
    engine = RemoteEngine(
        [url_of(server) for server in servers],
        secret=secret,
        options=replace(options_of(chat, patience_s=WAIT_S), **options),
        carrier=carrier or StreamedWeights(),
    )
    try:
        yield engine
    finally:
        engine.close()


def url_of(server: EngineServer | Listener) -> str:
    """Where a server listens."""
    return f"tcp://127.0.0.1:{server.address[1]}"


def say(channel: Channel, message: ServerMessage, body: bytes = b"") -> None:
    """Send a server's frame by hand."""
    channel.send(header(message), body)


def base_policy() -> Loaded:
    """A server's first word: it holds its model folder's weights."""
    return Loaded(policy=PolicyId())


def knock(server: EngineServer) -> Channel:
    """A connection that has not said anything yet."""
    connection = socket.create_connection(server.address, timeout=WAIT_S)
    return Channel(connection, peer="server")


def introduce(channel: Channel, *, secret: bytes = SECRET) -> ServerMessage:
    """Greet a server; what it answers."""
    challenge = read_server(channel.receive(), peer="server")
    assert isinstance(challenge, Challenge)
    nonce = new_nonce()
    mac = proof(secret, "client", challenge.nonce, nonce)
    channel.send(header(Hello(nonce=nonce, mac=mac)))
    answer = read_server(channel.receive(), peer="server")
    if isinstance(answer, Welcome):
        channel.trust()
        assert isinstance(read_server(channel.receive(), peer="server"), Loaded)
    return answer


def folder_of_weights(folder: Path) -> list[str]:
    """Names of the files in a folder of weights."""
    return sorted(file.name for file in folder.rglob("*.safetensors"))
