"""HTTP without the network: servers on 127.0.0.1, a connector that knows no other place."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from typing import Any, TypeVar

import httpx

from tapo_train.tools.addresses import AllowedHosts
from tapo_train.tools.net import FetchLimits, HttpClient

Answer = TypeVar("Answer")
Server = TypeVar("Server", bound=HTTPServer)
Reply = Callable[[str, asyncio.StreamWriter], Awaitable[None]]
"""Writes what the server says to a request (head and body as text)."""


class Answering(BaseHTTPRequestHandler):
    """A handler of a scripted server: reads what was sent, says bytes or JSON, logs nothing."""

    server: Any

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def say(self, content: object, status: int = 200) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Silence."""


@contextmanager
def threaded(server: Server) -> Iterator[Server]:
    """The server answers in a thread, until the block ends."""
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def served_by(handler: type[BaseHTTPRequestHandler], **state: Any) -> Iterator[Any]:
    """A server for the handler, which finds the state among the server's attributes."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    vars(server).update(state)
    with threaded(server):
        yield server


def url_of(server: HTTPServer) -> str:
    """Where a server on 127.0.0.1 is, without a path."""
    return f"http://127.0.0.1:{server.server_port}"


def response(body: bytes = b"ok", *, status: int = 200, **headers: str) -> bytes:
    """An HTTP/1.1 answer; `content_type="…"` becomes Content-Type."""
    fields = {"Content-Length": str(len(body))}
    fields |= {name.replace("_", "-").title(): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status} X\r\n{head}\r\n".encode() + body


@dataclass
class Loopback:
    """Connects to the server whatever the request's address, and remembers that address."""

    port: int = 0
    connected: list[tuple[str, str, str]] = field(default_factory=list)
    """(address, Host header, name for TLS) of every connection that was allowed."""
    requests: list[str] = field(default_factory=list)

    def connect(self) -> httpx.AsyncBaseTransport:
        """For `HttpClient(connect=…)`."""
        return _Redirected(self)


class _Redirected(httpx.AsyncBaseTransport):
    def __init__(self, loopback: Loopback) -> None:
        self._loopback = loopback
        # Everything is asked over plain HTTP, and reading certificates takes 25 ms each time.
        self._inner = httpx.AsyncHTTPTransport(verify=False, trust_env=False)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        seen = (request.url.host, request.headers["host"], request.extensions["sni_hostname"])
        self._loopback.connected.append(seen)
        request.url = request.url.copy_with(
            scheme="http", host="127.0.0.1", port=self._loopback.port
        )
        return await self._inner.handle_async_request(request)

    async def aclose(self) -> None:
        await self._inner.aclose()


@asynccontextmanager
async def serving(reply: Reply) -> AsyncIterator[Loopback]:
    """A server on 127.0.0.1 that says `reply` to every request."""
    loopback = Loopback()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            length = re.search(r"(?i)\ncontent-length: *(\d+)", head)
            body = await reader.readexactly(int(length[1])) if length else b""
            loopback.requests.append(head + body.decode("latin-1"))
            await reply(loopback.requests[-1], writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client has seen enough
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    loopback.port = server.sockets[0].getsockname()[1]
    try:
        yield loopback
    finally:
        server.close()


def saying(*answers: bytes) -> Reply:
    """The answers in turn, the last one for ever."""
    left = list(answers)

    async def reply(request: str, writer: asyncio.StreamWriter) -> None:
        writer.write(left.pop(0) if len(left) > 1 else left[0])
        await writer.drain()

    return reply


def names(addresses: Mapping[str, str | list[str]]) -> Callable[[str, int], Any]:
    """A resolver that knows these names; a list of addresses is handed out one per question."""
    left = {name: [a] if isinstance(a, str) else list(a) for name, a in addresses.items()}

    async def resolve(host: str, port: int) -> list[str]:
        if host not in left and set(host) <= set("0123456789.:abcdef"):
            return [host]  # an address already
        if host not in left:
            raise OSError(f"unknown name {host}")
        known = left[host]
        return (known.pop(0) if len(known) > 1 else known[0]).split()

    return resolve


def fetching(
    reply: Reply,
    use: Callable[[HttpClient, Loopback], Coroutine[Any, Any, Answer]],
    *,
    resolve: Mapping[str, str | list[str]] | None = None,
    allowed: tuple[str, ...] = (),
    limits: FetchLimits | None = None,
) -> Answer:
    """Run `use` with a client whose every connection ends at a server that says `reply`."""

    async def run() -> Answer:
        async with serving(reply) as loopback:
            extra = {} if resolve is None else {"resolve": names(resolve)}
            client = HttpClient(
                allowed=AllowedHosts.parse(allowed),
                limits=limits or FetchLimits(timeout_s=10.0),
                connect=loopback.connect,
                **extra,
            )
            return await use(client, loopback)

    return asyncio.run(run())
