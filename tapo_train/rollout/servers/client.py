"""HTTP to one engine server; the control plane's door of aiohttp.

A trainer asks hundreds of times a second, from the process that trains: aiohttp, which reads
answers in C, takes a quarter of httpx's CPU for it (docs/results.md).

The servers are the ones a recipe names and prove nothing but that they answer: what they say is
judged in `answers.py`. Nothing is taken from the environment, proxies least of all, as every
request carries the secret; redirections are not followed, and cookies not kept.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping
from typing import Any

import aiohttp

from tapo_train.errors import EngineError, EngineLostError
from tapo_train.rollout.servers.gate import authorization

ANSWER_BYTES = 256 * 2**20
"""Longest answer that is read."""
KEPT_S = 4.0
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
        self._headers = {
            "Authorization": authorization(secret),
            "Accept-Encoding": "identity",
            "Content-Type": "application/json",
        }
        self._session: aiohttp.ClientSession | None = None

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
            read_s: [s] it may be silent; infinity: until `cut`. Default: as long as connecting.

        Raises:
            EngineLostError: nothing came back; as ServerFailedError for HTTP 5xx.
            EngineError: HTTP 4xx.
        """
        silent_s = None if read_s == math.inf else read_s or self._timeout_s
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=self._timeout_s, sock_read=silent_s
        )
        call = asyncio.create_task(self._exchange(method, path, body, timeout, headers))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        try:
            status, answer = await call
        except (aiohttp.ClientError, TimeoutError) as error:
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
        if self._session is not None:
            await self._session.close()

    async def _exchange(
        self,
        method: str,
        path: str,
        body: Body | None,
        timeout: aiohttp.ClientTimeout,
        headers: Mapping[str, str] | None,
    ) -> tuple[int, bytes]:
        async with self._connected().request(
            method,
            self._url + path,
            headers=self._headers | dict(headers or {}),
            data=None if body is None else json.dumps(body).encode(),
            timeout=timeout,
            allow_redirects=False,
        ) as response:
            answer = bytearray()
            async for chunk in response.content.iter_any():
                answer += chunk
                if len(answer) > ANSWER_BYTES:
                    raise aiohttp.ClientPayloadError(f"an answer of more than {ANSWER_BYTES} bytes")
            return response.status, bytes(answer)

    def _connected(self) -> aiohttp.ClientSession:
        """On the event loop that asks."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEPT_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
            )
        return self._session
