"""HTTP to one engine server; the control plane's door of httpx.

The servers are the ones a recipe names and prove nothing but that they answer: what they say is
judged in `answers.py`. Nothing is taken from the environment, proxies least of all, as every
request carries the secret.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import httpx

from tapo_train.errors import EngineError, EngineLostError
from tapo_train.rollout.servers.gate import authorization
from tapo_train.tools.connections import Connections

ANSWER_BYTES = 256 * 2**20
"""Longest answer that is read."""
KEPT_S = 2.0
"""[s] an unused connection is kept; less than servers keep theirs."""

Body = Mapping[str, Any]


class ServerFailedError(EngineLostError):
    """HTTP 5xx."""


class Client:
    """Asks one server; on one event loop."""

    def __init__(self, url: str, *, secret: str, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._calls: set[asyncio.Task[tuple[int, bytes]]] = set()
        self._url = url.rstrip("/")
        self._headers = {"Authorization": authorization(secret), "Accept-Encoding": "identity"}
        self._connections = Connections(idle_s=KEPT_S, asks_again=False)

    async def ask(
        self,
        method: str,
        path: str,
        body: Body | None = None,
        *,
        read_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> bytes:
        """The body of an answer with HTTP 200.

        Args:
            read_s: [s] it may take; infinity: until `cut`. Default: as long as connecting.

        Raises:
            EngineLostError: nothing came back; as ServerFailedError for HTTP 5xx.
            EngineError: HTTP 4xx.
        """
        timeout = httpx.Timeout(self._timeout_s, read=read_s or self._timeout_s)
        call = asyncio.create_task(self._exchange(method, path, body, timeout, headers))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        try:
            status, answer = await call
        except httpx.HTTPError as error:
            raise EngineLostError(f"{path}: {type(error).__name__}: {error}") from error
        except asyncio.CancelledError:
            asking = asyncio.current_task()
            if asking is None or asking.cancelling():
                raise
            raise EngineLostError(f"{path}: given up") from None
        if status == 200:
            return answer
        said = " ".join(answer[:500].decode("utf-8", "replace").split())
        kind = ServerFailedError if status >= 500 else EngineError
        raise kind(f"{path}: HTTP {status}: {said}")

    def cut(self) -> None:
        """Give up everything that is under way; the server aborts it."""
        for call in self._calls:
            call.cancel()

    async def close(self) -> None:
        """Hang up."""
        self.cut()
        await self._connections.close()

    async def _exchange(
        self,
        method: str,
        path: str,
        body: Body | None,
        timeout: httpx.Timeout,
        headers: Mapping[str, str] | None,
    ) -> tuple[int, bytes]:
        request = httpx.Request(
            method,
            self._url + path,
            headers=self._headers | dict(headers or {}),
            json=body,
            extensions={"timeout": timeout.as_dict()},
        )
        host = request.url.host
        origin = (request.url.scheme, host, request.url.port or 0)
        async with self._connections.answer(request, origin, [host]) as response:
            answer = bytearray()
            async for chunk in response.aiter_raw():
                answer += chunk
                if len(answer) > ANSWER_BYTES:
                    raise httpx.ReadError(f"an answer of more than {ANSWER_BYTES} bytes")
            return response.status_code, bytes(answer)
