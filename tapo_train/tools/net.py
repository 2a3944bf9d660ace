"""The one HTTP client: nothing leaves this process without the checks of this file.

    address ─ scheme, host, port ─ resolve ─ every address public ─ connect to that address
       ▲                                                                    │
       └──────────── redirect: the same checks for the next one ────────────┘

The host's name stays in the Host header and in TLS, where the certificate is checked
against it; but the connection goes to the address that was judged, so a name that resolves
to something else a moment later changes nothing. Bytes are counted as they arrive and
again as they are unpacked. Proxies of the environment, cookies and stored passwords
do not exist here. Each request has a connection of its own: a step of the run has an event
loop of its own, and connections do not outlive loops.

What a guard forbids is `ToolRefusedError`; a server that is down, breaks off or answers
nonsense is `ToolDownError`, one that answers "no" (HTTP 4xx) `ToolError`, one that is slow
`TimeoutError`.
"""

from __future__ import annotations

import asyncio
import socket
import zlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import cache
from ssl import SSLContext

import httpx

from tapo_train.errors import ToolDownError, ToolError, ToolRefusedError
from tapo_train.tools.addresses import (
    AllowedHosts,
    require_address,
    require_destination,
    shown_text,
)

__all__ = ["FetchLimits", "Fetched", "HttpClient"]

Resolve = Callable[[str, int], Awaitable[list[str]]]
"""Host and port → its addresses."""
Connect = Callable[[], httpx.AsyncBaseTransport]
"""Makes what sends one request; its URL's host is the judged address."""

MAX_URL_CHARS = 4096
RATIO_FROM_BYTES = 64 * 1024
"""Below so many unpacked bytes no ratio is suspicious."""
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_BUSY = frozenset({408, 425, 429})
_SAID_BYTES = 512
"""How much of an error's body is read for the message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchLimits:
    """What one fetch may cost, redirects included."""

    timeout_s: float = 20.0
    max_bytes: int = 8 * 2**20
    """[B] of the body as sent."""
    max_unpacked_bytes: int = 16 * 2**20
    """[B] of the body after decompression."""
    max_ratio: float = 100.0
    """Unpacked over sent; JSON and HTML stay below 30."""
    max_redirects: int = 4


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


@cache
def _tls() -> SSLContext:
    return httpx.create_ssl_context(trust_env=False)


def direct_transport() -> httpx.AsyncBaseTransport:
    """A connection of its own, certificates checked, nothing taken from the environment."""
    return httpx.AsyncHTTPTransport(verify=_tls(), trust_env=False, retries=0)


class HttpClient:
    """Fetches within limits, from places that are allowed.

    Args:
        allowed: hosts that may be private because the recipe names them.
        forbidden: if not empty, nothing is fetched at all, and this is why.
        resolve, connect: replaced in tests, so that no packet leaves the machine.
    """

    def __init__(
        self,
        *,
        allowed: AllowedHosts | None = None,
        limits: FetchLimits | None = None,
        forbidden: str = "",
        resolve: Resolve = system_resolver,
        connect: Connect = direct_transport,
    ) -> None:
        self._allowed = allowed or AllowedHosts()
        self._limits = limits or FetchLimits()
        self._forbidden = forbidden
        self._resolve = resolve
        self._connect = connect

    async def get(self, url: str) -> Fetched:
        """The answer to a GET; raises as the module says."""
        return await self._fetch("GET", url, b"", "")

    async def post(self, url: str, content: bytes, *, content_type: str) -> Fetched:
        """The answer to a POST; raises as the module says."""
        return await self._fetch("POST", url, content, content_type)

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
        address = await self._judged_address(url)
        headers = {"Accept-Encoding": "gzip", "User-Agent": "tapo_train", "Connection": "close"}
        if content_type:
            headers["Content-Type"] = content_type
        request = httpx.Request(
            method,
            url,
            headers=headers,
            content=content,
            extensions={"sni_hostname": url.raw_host.decode("ascii")},
        )
        # The Host header was made from the name; only where to connect changes.
        request.url = url.copy_with(host=address)
        async with self._connect() as transport:
            response = await transport.handle_async_request(request)
            try:
                return await self._read(response, str(url))
            finally:
                await response.aclose()

    async def _judged_address(self, url: httpx.URL) -> str:
        """Resolve once; the first address, if every one is allowed."""
        host = url.raw_host.decode("ascii")
        port = url.port if url.port is not None else 443 if url.scheme == "https" else 80
        if url.userinfo:
            raise ToolRefusedError("an address with a user name or password")
        require_destination(url.scheme, host, port, self._allowed)
        try:
            found = await self._resolve(host.strip("[]"), port)
        except (OSError, UnicodeError) as error:
            raise ToolDownError(f"{host} cannot be resolved: {error}") from error
        if not found:
            raise ToolDownError(f"{host} has no address")
        judged = [require_address(text, host, port, self._allowed) for text in found]
        return judged[0]

    async def _read(self, response: httpx.Response, url: str) -> Fetched | tuple[int, str]:
        status, headers = response.status_code, response.headers
        if status in _REDIRECTS and "location" in headers:
            return status, headers["location"]
        if not 200 <= status < 300:
            raise await _refusal(response, url)
        declared = headers.get("content-length", "")
        if declared.isascii() and declared.isdigit() and int(declared) > self._limits.max_bytes:
            raise self._too_large(f"announced {declared} bytes")
        body = _Body(self._limits, packed=_is_packed(headers))
        async for chunk in response.aiter_raw():
            body.add(chunk)
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        return Fetched(url=url, content_type=kind, data=body.whole())

    def _too_large(self, found: str) -> ToolRefusedError:
        return ToolRefusedError(
            f"the answer is too large: {found}; at most {self._limits.max_bytes} are read"
        )


class _Body:
    """A body that is counted while it arrives and while it is unpacked."""

    def __init__(self, limits: FetchLimits, *, packed: bool) -> None:
        self._limits = limits
        self._unpack = zlib.decompressobj(wbits=31) if packed else None
        self._sent = 0
        self._data = bytearray()

    def add(self, chunk: bytes) -> None:
        """Raises ToolRefusedError beyond a limit, ToolDownError for damaged gzip."""
        self._sent += len(chunk)
        if self._sent > self._limits.max_bytes:
            raise ToolRefusedError(
                f"the answer is too large: more than {self._limits.max_bytes} bytes"
            )
        self._data += chunk if self._unpack is None else self._unpacked(chunk)
        if len(self._data) > self._most():
            raise ToolRefusedError(
                f"a decompression bomb: {self._sent} bytes unpack to more than {len(self._data)}"
            )

    def whole(self) -> bytes:
        """The unpacked body, once everything was added."""
        if self._unpack is not None and not self._unpack.eof:
            raise ToolDownError("the answer's gzip stream is cut off")
        return bytes(self._data)

    def _most(self) -> int:
        if self._unpack is None:
            return self._limits.max_bytes
        by_ratio = max(RATIO_FROM_BYTES, int(self._sent * self._limits.max_ratio))
        return min(self._limits.max_unpacked_bytes, by_ratio)

    def _unpacked(self, chunk: bytes) -> bytes:
        assert self._unpack is not None
        room = self._most() - len(self._data) + 1
        try:
            data = self._unpack.decompress(chunk, room)
        except zlib.error as error:
            raise ToolDownError(f"the answer is not gzip: {error}") from error
        if self._unpack.unused_data:
            raise ToolDownError("the answer goes on after the end of its gzip stream")
        return data


def _parsed(url: str) -> httpx.URL:
    if len(url) > MAX_URL_CHARS:
        raise ToolRefusedError(f"an address of {len(url)} characters; at most {MAX_URL_CHARS}")
    try:
        return httpx.URL(url)
    except (ValueError, TypeError) as error:  # what IDNA raises for impossible names
        raise ToolRefusedError(f"the address cannot be read: {error}") from error


def _is_packed(headers: Mapping[str, str]) -> bool:
    """Whether the body is gzip; nothing else was asked for."""
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip"):
        raise ToolDownError(
            f"the answer is encoded as {encoding[:40]!r}; only gzip was asked for", retryable=False
        )
    return encoding.endswith("gzip")


async def _refusal(response: httpx.Response, url: str) -> ToolError:
    """The error for a status that is neither success nor redirect, with what the server says."""
    said = b""
    if not _is_packed(response.headers):
        async for chunk in response.aiter_raw():
            said = (said + chunk)[:_SAID_BYTES]
            if len(said) >= _SAID_BYTES:
                break
    # Some servers repeat the key that they refuse.
    words = shown_text(said.decode("utf-8", "replace"), secrets_of=url)
    words = "".join(c if c.isprintable() else " " for c in words)
    message = f"HTTP {response.status_code} {' '.join(words.split())[:200]}".rstrip()
    if response.status_code in _BUSY or response.status_code >= 500:
        return ToolDownError(message)
    return ToolError(message)
