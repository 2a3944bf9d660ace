"""Connections that are kept: a request to a server that was asked before needs no new handshake.

A connection is used again only for the same scheme, name, port and judged address: its certificate
was checked against that name, so another one at the same address has a connection of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import cache, partial
from ssl import SSLContext

import httpx

__all__ = ["Connect", "Connections", "direct_transport"]

Connect = Callable[[], httpx.AsyncBaseTransport]
"""Makes what sends requests to one place; their URL's host is the judged address."""
Origin = tuple[str, str, int]
"""Scheme, name, port."""

MOST_PLACES = 64
"""Places whose connections are kept; that of the longest silence gives way."""
IDLE_S = 30.0
"""[s] an unused connection is kept."""
MOST_IDLE = 256
"""Unused connections that are kept to one place."""


@cache
def _tls() -> SSLContext:
    return httpx.create_ssl_context(trust_env=False)


def direct_transport() -> httpx.AsyncBaseTransport:
    """Certificates checked, nothing taken from the environment."""
    # One connection each: httpcore looks at all connections of a pool, with a system call for
    # each idle one, whenever a request begins or ends.
    limits = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=IDLE_S)
    return httpx.AsyncHTTPTransport(verify=_tls(), trust_env=False, retries=0, limits=limits)


class _Place:
    """The connections to one judged address under one name."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self._free: deque[tuple[float, httpx.AsyncBaseTransport]] = deque()
        """With the time [s] since which each is unused; the last one used comes last."""
        self.under_way = 0

    @asynccontextmanager
    async def sent(self, request: httpx.Request) -> AsyncIterator[httpx.Response]:
        """The answer; the connection is free again when it has been read."""
        self.under_way += 1
        transport = None
        try:
            transport, response = await self._response(request)
            try:
                yield response
            finally:
                await response.aclose()
        finally:
            self.under_way -= 1
            if transport is not None:
                self._free.append((time.monotonic(), transport))
            await self._drop_stale()

    async def close(self) -> None:
        """Close what is free."""
        while self._free:
            await self._free.pop()[1].aclose()

    async def _response(
        self, request: httpx.Request
    ) -> tuple[httpx.AsyncBaseTransport, httpx.Response]:
        """Once more where a kept connection broke: servers close them at any time (RFC 9112)."""
        await self._drop_stale()
        if self._free:
            kept = self._free.pop()[1]
            with suppress(httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                return kept, await _asked(kept, request)
        fresh = self._connect()
        return fresh, await _asked(fresh, request)

    async def _drop_stale(self) -> None:
        while self._free and (
            len(self._free) > MOST_IDLE or self._free[0][0] < time.monotonic() - IDLE_S
        ):
            await self._free.popleft()[1].aclose()


async def _asked(transport: httpx.AsyncBaseTransport, request: httpx.Request) -> httpx.Response:
    """The head of the answer; without one the connection is closed."""
    async with AsyncExitStack() as broken:
        broken.push_async_callback(transport.aclose)
        response = await transport.handle_async_request(request)
        broken.pop_all()
    return response


class Connections:
    """The kept connections of a client. On one event loop at a time."""

    def __init__(self, connect: Connect = direct_transport) -> None:
        self._place_of = partial(_Place, connect)
        self._places: OrderedDict[tuple[Origin, str], _Place] = OrderedDict()
        self._loop: asyncio.AbstractEventLoop | None = None

    @asynccontextmanager
    async def answer(
        self, request: httpx.Request, origin: Origin, addresses: Sequence[str]
    ) -> AsyncIterator[httpx.Response]:
        """The answer, of which the head has been read.

        Args:
            origin: what the request's URL names; its Host header is made from that already.
            addresses: judged; one that is connected to is preferred, else the first.
        """
        self._bind()
        address = next((a for a in addresses if (origin, a) in self._places), addresses[0])
        # Only where to connect changes.
        request.url = request.url.copy_with(host=address)
        place = await self._place(origin, address)
        async with place.sent(request) as response:
            yield response

    async def close(self) -> None:
        """Close all of them."""
        self._bind()
        while self._places:
            _, place = self._places.popitem()
            await place.close()

    async def _place(self, origin: Origin, address: str) -> _Place:
        key = (origin, address)
        if key not in self._places:
            self._places[key] = self._place_of()
        self._places.move_to_end(key)
        place = self._places[key]
        silent = [old for old, kept in self._places.items() if not kept.under_way and old != key]
        for old in silent[: max(0, len(self._places) - MOST_PLACES)]:
            await self._places.pop(old).close()
        return place

    def _bind(self) -> None:
        """Connections belong to the loop they were opened on."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop = loop
            self._places.clear()
