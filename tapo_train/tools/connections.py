"""Connections that are kept: a request to a server that was asked before needs no new handshake.

A connection is used again only for the same scheme, name, port and judged address: its certificate
was checked against that name, so another one at the same address has a connection of its own.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import cache
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
MOST_IDLE = 64
"""Unused connections that are kept to one place."""


@cache
def _tls() -> SSLContext:
    return httpx.create_ssl_context(trust_env=False)


def direct_transport() -> httpx.AsyncBaseTransport:
    """Certificates checked, nothing taken from the environment."""
    limits = httpx.Limits(max_keepalive_connections=MOST_IDLE, keepalive_expiry=IDLE_S)
    return httpx.AsyncHTTPTransport(verify=_tls(), trust_env=False, retries=0, limits=limits)


class _Place:
    """The connections to one judged address under one name."""

    def __init__(self, transport: httpx.AsyncBaseTransport) -> None:
        self.transport = transport
        self.under_way = 0
        self.has_answered = False


class Connections:
    """The kept connections of a client. On one event loop at a time."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
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
        place.under_way += 1
        try:
            response = await self._sent(place, request)
            place.has_answered = True
            try:
                yield response
            finally:
                await response.aclose()
        finally:
            place.under_way -= 1

    async def close(self) -> None:
        """Close all of them."""
        self._bind()
        while self._places:
            _, place = self._places.popitem()
            await place.transport.aclose()

    async def _sent(self, place: _Place, request: httpx.Request) -> httpx.Response:
        """Once more where a kept connection broke: servers close them at any time (RFC 9112)."""
        try:
            return await place.transport.handle_async_request(request)
        except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
            if not place.has_answered:
                raise
        place.has_answered = False
        return await place.transport.handle_async_request(request)

    async def _place(self, origin: Origin, address: str) -> _Place:
        key = (origin, address)
        if key not in self._places:
            self._places[key] = _Place(self._connect())
        self._places.move_to_end(key)
        place = self._places[key]
        silent = [old for old, kept in self._places.items() if not kept.under_way and old != key]
        for old in silent[: max(0, len(self._places) - MOST_PLACES)]:
            await self._places.pop(old).transport.aclose()
        return place

    def _bind(self) -> None:
        """Connections belong to the loop they were opened on."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop = loop
            self._places.clear()
