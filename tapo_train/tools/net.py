"""The one HTTP client: nothing leaves this process without the checks of this file.

    address ─ scheme, host, port ─ resolve ─ every address public ─ connect to that address
       ▲                                                                    │
       └──────────── redirect: the same checks for the next one ────────────┘

The host's name stays in the Host header and in TLS, where the certificate is checked
against it; but the connection goes to the address that was judged, so a name that resolves
to something else a moment later changes nothing. Bytes are counted as they arrive and
again as they are unpacked. Proxies of the environment, cookies and stored passwords
do not exist here. Connections are kept (`connections.py`).

What a guard forbids is `ToolRefusedError`; a server that is down, breaks off or answers
nonsense is `ToolDownError`, one that answers "no" (HTTP 4xx) `ToolStatusError`, one that is slow
`TimeoutError`.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import httpx

from tapo_train.errors import ToolDownError, ToolRefusedError
from tapo_train.tools.addresses import (
    AllowedHosts,
    require_address,
    require_destination,
    shown_text,
)
from tapo_train.tools.connections import Connect, Connections, direct_transport
from tapo_train.tools.http_answer import Body, FetchLimits, is_packed, refusal

__all__ = ["FetchLimits", "Fetched", "HttpClient"]

Resolve = Callable[[str, int], Awaitable[list[str]]]
"""Host and port → its addresses."""

MAX_URL_CHARS = 4096
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """A whole answer with status 2xx."""

    url: str
    """After redirects."""
    content_type: str
    """Lower case, without parameters; "" if none was sent."""
    data: bytes


async def system_resolver(host: str, port: int) -> list[str]:
    """Every address the operating system has for `host`, in its order."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(item[4][0]) for item in found))


class HttpClient:
    """Fetches within limits, from places that are allowed.

    Args:
        allowed: hosts that may be private because the recipe names them.
        headers: sent to the hosts that are `allowed` by name, and nowhere else: keys.
        forbidden: if not empty, nothing is fetched at all, and this is why.
        resolve, connect: replaced in tests, so that no packet leaves the machine.
    """

    def __init__(
        self,
        *,
        allowed: AllowedHosts | None = None,
        limits: FetchLimits | None = None,
        headers: Mapping[str, str] | None = None,
        forbidden: str = "",
        resolve: Resolve = system_resolver,
        connect: Connect = direct_transport,
    ) -> None:
        self._allowed = allowed or AllowedHosts()
        self._limits = limits or FetchLimits()
        self._own_headers = dict(headers or {})
        self._forbidden = forbidden
        self._resolve = resolve
        self._connections = Connections(connect)

    async def get(self, url: str) -> Fetched:
        """The answer to a GET; raises as the module says."""
        return await self._fetch("GET", url, b"", "")

    async def post(self, url: str, content: bytes, *, content_type: str) -> Fetched:
        """The answer to a POST; raises as the module says."""
        return await self._fetch("POST", url, content, content_type)

    async def close(self) -> None:
        """Close the connections that were kept; a later request opens others."""
        await self._connections.close()

    async def _fetch(self, method: str, url: str, content: bytes, content_type: str) -> Fetched:
        if self._forbidden:
            raise ToolRefusedError(self._forbidden)
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                return await self._follow(method, _parsed(url), content, content_type)
        except httpx.InvalidURL as error:
            raise ToolRefusedError(f"the address cannot be read: {error}") from error
        except httpx.TimeoutException as error:
            raise TimeoutError(f"no answer in time: {type(error).__name__}") from error
        except (httpx.HTTPError, httpx.StreamError) as error:
            said = shown_text(f"{type(error).__name__}: {error}".rstrip(": "), secrets_of=url)
            raise ToolDownError(f"the connection failed ({said})") from error

    async def _follow(
        self, method: str, url: httpx.URL, content: bytes, content_type: str
    ) -> Fetched:
        for _ in range(self._limits.max_redirects + 1):
            answer = await self._exchange(method, url, content, content_type)
            if isinstance(answer, Fetched):
                return answer
            status, target = answer
            following = url.join(_parsed(target))
            if url.scheme == "https" and following.scheme != "https":
                raise ToolRefusedError(f"a redirect from https to {following.scheme}")
            if status == 303 or (status in (301, 302) and method == "POST"):
                method, content, content_type = "GET", b"", ""
            url = following
        raise ToolRefusedError(f"more than {self._limits.max_redirects} redirects")

    async def _exchange(
        self, method: str, url: httpx.URL, content: bytes, content_type: str
    ) -> Fetched | tuple[int, str]:
        """One request to one judged address: the answer, or (status, target) of a redirect."""
        host, port = _host_and_port(url)
        addresses = await self._judged_addresses(url, host, port)
        headers = {"Accept-Encoding": "gzip", "User-Agent": "tapo_train"}
        if content_type:
            headers["Content-Type"] = content_type
        if self._allowed.names(host, port):
            headers |= self._own_headers
        request = httpx.Request(
            method,
            url,
            headers=headers,
            content=content,
            extensions={"sni_hostname": host},
        )
        origin = (url.scheme, host, port)
        async with self._connections.answer(request, origin, addresses) as response:
            return await self._read(response, str(url))

    async def _judged_addresses(self, url: httpx.URL, host: str, port: int) -> list[str]:
        """Resolve once; the addresses, if every one is allowed."""
        if url.userinfo:
            raise ToolRefusedError("an address with a user name or password")
        require_destination(url.scheme, host, port, self._allowed)
        try:
            found = await self._resolve(host.strip("[]"), port)
        except (OSError, UnicodeError) as error:
            raise ToolDownError(f"{host} cannot be resolved: {error}") from error
        if not found:
            raise ToolDownError(f"{host} has no address")
        return [require_address(text, host, port, self._allowed) for text in found]

    async def _read(self, response: httpx.Response, url: str) -> Fetched | tuple[int, str]:
        status, headers = response.status_code, response.headers
        if status in _REDIRECTS and "location" in headers:
            return status, headers["location"]
        if not 200 <= status < 300:
            raise await refusal(
                status, headers, response.aiter_raw(), url=url, secrets=self._secrets()
            )
        declared = headers.get("content-length", "")
        if declared.isascii() and declared.isdigit() and int(declared) > self._limits.max_bytes:
            raise self._too_large(f"announced {declared} bytes")
        body = Body(self._limits, packed=is_packed(headers))
        async for chunk in response.aiter_raw():
            body.add(chunk)
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        return Fetched(url=url, content_type=kind, data=body.whole())

    def _secrets(self) -> list[str]:
        """Pieces of the headers' values, as a server may repeat them."""
        return [word for value in self._own_headers.values() for word in value.split()]

    def _too_large(self, found: str) -> ToolRefusedError:
        return ToolRefusedError(
            f"the answer is too large: {found}; at most {self._limits.max_bytes} are read"
        )


def _host_and_port(url: httpx.URL) -> tuple[str, int]:
    port = url.port if url.port is not None else 443 if url.scheme == "https" else 80
    return url.raw_host.decode("ascii"), port


def _parsed(url: str) -> httpx.URL:
    if len(url) > MAX_URL_CHARS:
        raise ToolRefusedError(f"an address of {len(url)} characters; at most {MAX_URL_CHARS}")
    try:
        return httpx.URL(url)
    except (ValueError, TypeError) as error:  # what IDNA raises for impossible names
        raise ToolRefusedError(f"the address cannot be read: {error}") from error
