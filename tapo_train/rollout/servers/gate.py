"""The gate of an engine server: vLLM's `--middleware`, in front of every path.

vLLM's own `--api-key` leaves `/pause`, `/update_weights` and `/collective_rpc` open to whoever
reaches the port. Here everything wants the secret, unknown paths and web sockets included.
Behind the gate one path is added: what the server serves (`identity.py`), said by the process
that started it. This module is imported by vLLM's server, and loads nothing heavy.
"""

from __future__ import annotations

import hmac
import os
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from tapo_train.errors import ConfigError

SECRET_VARIABLE = "TAPO_ENGINE_SECRET"
SERVED_VARIABLE = "TAPO_ENGINE_SERVED"
"""JSON of a `Served`, for the gate to repeat."""
SHORTEST_SECRET = 16
"""[characters]"""
SERVED_PATH = "/tapo_train/served"

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class Gate:
    """ASGI middleware: lets through what carries the secret.

    Raises:
        ConfigError: the process has no secret.
    """

    def __init__(self, app: Application) -> None:
        self._app = app
        self._wanted = authorization(shared_secret()).encode()
        self._served = os.environ.get(SERVED_VARIABLE, "{}").encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, or the start and the end of the server."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif not self._knows_the_secret(scope):
            await _refuse(scope, send)
        elif scope["type"] == "http" and scope["path"] == SERVED_PATH:
            await _answer(send, 200, self._served)
        else:
            await self._app(scope, receive, send)

    def _knows_the_secret(self, scope: Scope) -> bool:
        found = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(found) == 1 and hmac.compare_digest(found[0], self._wanted)


async def _refuse(scope: Scope, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
    else:
        await _answer(send, 401, b'{"error": "wrong secret"}')


async def _answer(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def authorization(secret: str) -> str:
    """The header's value that knows the secret."""
    return f"Bearer {secret}"


def shared_secret() -> str:
    """The secret both sides are started with.

    Raises:
        ConfigError: it is not set, too short to be one, or cannot stand in a header.
    """
    secret = os.environ.get(SECRET_VARIABLE, "")
    if not re.fullmatch(rf"[!-~]{{{SHORTEST_SECRET},}}", secret):
        raise ConfigError(
            f"{SECRET_VARIABLE}: found {len(secret)} characters in the environment, wanted the "
            f"secret that trainer and engine servers share: at least {SHORTEST_SECRET} letters, "
            "digits and signs of ASCII without blanks (for instance from `openssl rand -hex 32`)"
        )
    return secret
