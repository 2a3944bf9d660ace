"""The HTTP client: where it goes, what it refuses, and that every failure has a type.

Every connection of these tests ends at a server on 127.0.0.1; `connected` says which address
the client wanted, so an empty list proves that no packet would have left.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import zlib
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest
from loopback import Loopback, Reply, fetching, names, response, saying

from tapo_train.errors import ConfigError, ToolDownError, ToolRefusedError, ToolStatusError
from tapo_train.tools.addresses import AllowedHosts, require_address
from tapo_train.tools.net import Fetched, FetchLimits, HttpClient

PUBLIC = "93.184.215.14"
OK = saying(response(b"hello", content_type="Text/Plain; charset=utf-8"))


async def get(client: HttpClient, loopback: Loopback, url: str = "http://site.test/") -> Fetched:
    return await client.get(url)


def test_a_page_of_a_public_host_is_fetched_from_the_address_that_was_judged() -> None:
    async def use(client: HttpClient, loopback: Loopback) -> None:
        page = await client.get("https://Site.test/a?b=c")
        assert page == Fetched(
            url="https://site.test/a?b=c", content_type="text/plain", data=b"hello"
        )
        assert loopback.connected == [(PUBLIC, "site.test", "site.test")]
        assert loopback.requests[0].startswith("GET /a?b=c HTTP/1.1\r\n")

    fetching(OK, use, resolve={"site.test": PUBLIC})


def test_a_post_carries_its_body_and_kind() -> None:
    async def use(client: HttpClient, loopback: Loopback) -> None:
        await client.post("http://site.test/s", b'{"q": 1}', content_type="application/json")
        head, _, body = loopback.requests[0].partition("\r\n\r\n")
        assert head.startswith("POST /s ") and body == '{"q": 1}'
        assert "content-type: application/json" in head.lower()

    fetching(OK, use, resolve={"site.test": PUBLIC})


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://127.1/",
        "http://2130706433/",  # 127.0.0.1 as one number
        "http://0x7f000001/",
        "http://0177.0.0.1/",  # octal
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[::ffff:7f00:1]/",
        "http://[::127.0.0.1]/",
        "http://[64:ff9b::7f00:1]/",  # NAT64
        "http://[2002:7f00:1::]/",  # 6to4
        "http://[2001:0:7f00:1::]/",  # Teredo
        "http://[fe80::1]/",
        "http://[fd00:ec2::254]/",  # a cloud's metadata service
        "http://[ff02::1]/",
        "http://169.254.169.254/latest/meta-data/",
        "http://168.63.129.16/",
        "http://100.100.100.200/",
        "http://192.0.0.192/",
        "http://10.0.0.1/",
        "http://172.16.0.1/",
        "http://192.168.1.1/",
        "http://0.0.0.0/",
        "http://224.0.0.1/",
        "http://255.255.255.255/",
        "http://localhost/",
        "http://LOCALHOST./",
        f"http://{PUBLIC}@127.0.0.1/",
        f"http://127.0.0.1#@{PUBLIC}/",
        "http://127。0。0。1/",
        "http://⓵27.0.0.1/",
    ],
)
def test_this_machine_and_private_networks_are_not_met_however_they_are_written(url: str) -> None:
    async def use(client: HttpClient, loopback: Loopback) -> None:
        with pytest.raises((ToolRefusedError, ToolDownError)) as refused:
            await client.get(url)
        assert loopback.connected == []
        if url not in ("http://⓵27.0.0.1/", "http://LOCALHOST./"):  # which may be no names at all
            assert isinstance(refused.value, ToolRefusedError)

    fetching(OK, use)


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("file:///etc/passwd", "scheme 'file'"),
        ("ftp://site.test/", "scheme 'ftp'"),
        ("gopher://site.test:70/", "scheme 'gopher'"),
        ("//site.test/", "scheme ''"),
        ("http:///path", "no host"),
        ("http://site.test:22/", "port 22"),
        ("http://site.test:8080/", "port 8080"),
        ("http://site.test:0/", "port 0"),
        ("http://site.test:99999/", "port 99999"),
        ("http://site.test:80x/", "cannot be read"),
        ("http://user:password@site.test/", "user name"),
        ("http://[::1/", "cannot be read"),
        ("http://site.test/" + "a" * 5000, "5017 characters"),
        ("http://site\x00.test/", "cannot be read"),
    ],
)
def test_other_schemes_ports_and_malformed_addresses_are_refused(url: str, complaint: str) -> None:
    async def use(client: HttpClient, loopback: Loopback) -> None:
        with pytest.raises(ToolRefusedError, match=complaint.replace("'", ".")):
            await client.get(url)
        assert loopback.connected == []

    fetching(OK, use, resolve={"site.test": PUBLIC})


def test_a_name_with_one_private_address_among_public_ones_is_refused() -> None:
    async def use(client: HttpClient, loopback: Loopback) -> None:
        with pytest.raises(ToolRefusedError, match=r"10\.0\.0\.7, a private address"):
            await client.get("http://both.test/")
        assert loopback.connected == []

    fetching(OK, use, resolve={"both.test": f"{PUBLIC} 10.0.0.7"})


def test_a_name_that_resolves_differently_the_second_time_gains_nothing() -> None:
    async def use(client: HttpClient, loopback: Loopback) -> None:
        assert (await client.get("http://rebind.test/")).data == b"hello"
        assert [seen[0] for seen in loopback.connected] == [PUBLIC]  # asked once, used as judged
        with pytest.raises(ToolRefusedError, match="loopback"):
            await client.get("http://rebind.test/")
        assert len(loopback.connected) == 1

    fetching(OK, use, resolve={"rebind.test": [PUBLIC, "127.0.0.1"]})


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("http://169.254.169.254/latest/meta-data/iam", "link-local"),
        ("//127.0.0.1/", "loopback"),
        ("http://inside.test/", "private"),
        ("http://[::ffff:10.0.0.1]/", "address"),
        ("file:///etc/passwd", "scheme"),
        ("javascript:alert(1)", "scheme"),
        ("http://site.test:6379/", "port 6379"),
        ("http://site.test:99999/", "port 99999"),
        ("http://a@site.test/", "user name"),
    ],
)
def test_every_redirect_is_judged_like_the_first_address(target: str, complaint: str) -> None:
    async def use(client: HttpClient, loopback: Loopback) -> None:
        with pytest.raises(ToolRefusedError, match=complaint):
            await client.get("http://site.test/")
        assert [seen[0] for seen in loopback.connected] == [PUBLIC]

    moved = saying(response(b"", status=302, location=target))
    fetching(moved, use, resolve={"site.test": PUBLIC, "inside.test": "192.168.0.9"})


def test_a_good_redirect_is_followed_and_a_circle_is_not() -> None:
    async def use(client: HttpClient, loopback: Loopback) -> None:
        page = await client.post("http://site.test/a", b"secret", content_type="text/plain")
        assert page.data == b"there" and page.url == "http://other.test/b"
        assert loopback.requests[1].startswith("GET /b ") and "secret" not in loopback.requests[1]
        with pytest.raises(ToolRefusedError, match="more than 4 redirects"):
            await client.get("http://site.test/circle")
        assert len(loopback.connected) == 2 + 5

    circle = response(b"", status=302, location="/circle")
    answers = saying(
        response(b"", status=303, location="http://other.test/b"), response(b"there"), circle
    )
    fetching(answers, use, resolve={"site.test": PUBLIC, "other.test": "8.8.8.8"})


def test_a_redirect_out_of_https_is_refused() -> None:
    async def use(client: HttpClient, loopback: Loopback) -> None:
        with pytest.raises(ToolRefusedError, match="from https to http"):
            await client.get("https://site.test/")

    moved = saying(response(b"", status=301, location="http://site.test/"))
    fetching(moved, use, resolve={"site.test": PUBLIC})


def test_a_named_host_may_be_private_on_its_port_and_only_there() -> None:
    async def use(client: HttpClient, loopback: Loopback) -> None:
        assert (await client.get("http://search.inside:8001/")).data == b"hello"
        assert (await client.get("http://127.0.0.1:9000/")).data == b"hello"
        for url in ("http://search.inside/", "http://127.0.0.1/", "http://other.inside:8001/"):
            with pytest.raises(ToolRefusedError):
                await client.get(url)
        with pytest.raises(ToolRefusedError, match="link-local"):
            await client.get("http://moved.inside/")

    fetching(
        OK,
        use,
        resolve={
            "search.inside": "10.1.2.3",
            "other.inside": "10.1.2.3",
            "moved.inside": "169.254.169.254",
            "127.0.0.1": "127.0.0.1",
        },
        allowed=("search.inside:8001", "127.0.0.1:9000", "moved.inside"),
    )


def test_an_address_written_out_in_the_recipe_is_the_recipes_own_doing() -> None:
    allowed = AllowedHosts.parse(["169.254.1.1", "[fd00::1]:8080"])
    assert require_address("169.254.1.1", "169.254.1.1", 80, allowed) == "169.254.1.1"
    assert allowed.names("169.254.1.1", 443) and not allowed.names("169.254.1.1", 8080)
    assert allowed.names("[FD00:0::1]", 8080) and not allowed.names("fd00::1", 80)


@pytest.mark.parametrize(
    "entry", ["", "a/b", "http://a", "a:b", "a:0", "a:70000", "*", "a b", ":8"]
)
def test_a_malformed_named_host_is_told_to_the_user(entry: str) -> None:
    with pytest.raises(ConfigError, match=r"tools\.allowed_hosts"):
        AllowedHosts.parse([entry])


def gzipped(data: bytes) -> Reply:
    return saying(response(gzip.compress(data), content_encoding="gzip"))


async def endless(request: str, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        writer.write(b"x" * 65536)
        await writer.drain()


async def silent(request: str, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(30)


async def dripping(request: str, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.05)


BOMB = gzip.compress(b"\0" * 20_000_000)
LIMITS = FetchLimits(timeout_s=1.0, max_bytes=100_000, max_unpacked_bytes=1_000_000)


@pytest.mark.parametrize(
    ("reply", "error", "complaint"),
    [
        (endless, ToolRefusedError, "too large: more than 100000 bytes"),
        (saying(response(b"", content_length="300000000")), ToolRefusedError, "300000000 bytes"),
        (saying(response(BOMB, content_encoding="gzip")), ToolRefusedError, "decompression bomb"),
        (gzipped(b"\0" * 900_000), ToolRefusedError, "decompression bomb"),  # ratio 1000
        (
            saying(response(gzip.compress(b"half")[:-4], content_encoding="gzip")),
            ToolDownError,
            "cut off",
        ),
        (saying(response(b"plain", content_encoding="gzip")), ToolDownError, "not gzip"),
        (
            saying(response(gzip.compress(b"a") * 2, content_encoding="gzip")),
            ToolDownError,
            "goes on",
        ),
        (saying(response(b"x", content_encoding="br")), ToolDownError, "only gzip"),
        (saying(response(b"x", content_encoding="gzip, gzip")), ToolDownError, "only gzip"),
        (saying(response(zlib.compress(b"x"), content_encoding="deflate")), ToolDownError, "only"),
        (silent, TimeoutError, ""),
        (dripping, TimeoutError, ""),
        (saying(b"not http at all\r\n\r\n"), ToolDownError, "connection failed"),
        (saying(b""), ToolDownError, "connection failed"),
        (saying(response(b"x", content_length="50")), ToolDownError, "connection failed"),
        (saying(response(b"", x="a" * 200_000)), ToolDownError, "connection failed"),
        (saying(response(b"over\x07 <b>loaded", status=503)), ToolDownError, "HTTP 503 over <b>l"),
        (saying(response(b"slow down", status=429)), ToolDownError, "HTTP 429 slow down"),
        (saying(response(b"no such thing", status=404)), ToolStatusError, "HTTP 404 no such thing"),
        (saying(response(b"", status=304)), ToolStatusError, "HTTP 304"),
    ],
)
def test_every_way_a_server_can_fail_has_its_error(
    reply: Reply, error: type[Exception], complaint: str
) -> None:
    async def use(client: HttpClient, loopback: Loopback) -> None:
        with pytest.raises(error, match=complaint or None) as raised:
            await client.get("http://site.test/")
        assert type(raised.value) is error

    fetching(reply, use, resolve={"site.test": PUBLIC}, limits=LIMITS)


def test_what_is_packed_tightly_but_small_is_read() -> None:
    page = fetching(gzipped(b"a" * 60_000), get, resolve={"site.test": PUBLIC}, limits=LIMITS)
    assert page.data == b"a" * 60_000
    text = b" ".join(hashlib.sha256(bytes([i])).hexdigest().encode() for i in range(250)) * 4
    page = fetching(gzipped(text), get, resolve={"site.test": PUBLIC}, limits=LIMITS)
    assert page.data == text


def test_a_server_that_is_not_there_is_down() -> None:
    async def use(client: HttpClient, loopback: Loopback) -> None:
        loopback.port = 1
        with pytest.raises(ToolDownError, match="connection failed"):
            await client.get("http://site.test/")
        with pytest.raises(ToolDownError, match="unknown name nowhere"):
            await client.get("http://nowhere.test/")
        with pytest.raises(ToolDownError, match="cannot be resolved"):
            await HttpClient().get(f"http://{'a' * 80}.test/")  # no resolver takes such a label

    fetching(OK, use, resolve={"site.test": PUBLIC})


def test_a_client_that_may_not_use_the_network_says_why_and_does_not_even_resolve() -> None:
    async def resolve(host: str, port: int) -> list[str]:
        raise AssertionError("asked for a name")

    client = HttpClient(forbidden="tools.replay=replay forbids the network", resolve=resolve)
    with pytest.raises(ToolRefusedError, match="forbids the network"):
        asyncio.run(client.get("http://site.test/"))


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")

    async def use(client: HttpClient, loopback: Loopback) -> None:
        named = AllowedHosts.parse([f"127.0.0.1:{loopback.port}"])
        direct = HttpClient(allowed=named)  # with the connector of a run
        assert (await direct.get(f"http://127.0.0.1:{loopback.port}/")).data == b"hello"

    fetching(OK, use)


async def keeping(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers every request of a connection with the port it came from."""
    port = str(writer.get_extra_info("peername")[1]).encode()
    try:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(response(port))
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


def kept(
    use: Callable[[HttpClient, asyncio.Server], Coroutine[Any, Any, None]],
    *,
    handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any] = keeping,
) -> None:
    """Run `use` with a client whose names all lead to a server that keeps connections."""

    async def run() -> None:
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        loopback = Loopback(port=server.sockets[0].getsockname()[1])
        resolve = names({"a.test": PUBLIC, "b.test": PUBLIC, "c.test": f"{PUBLIC} 93.184.215.15"})
        client = HttpClient(
            limits=FetchLimits(timeout_s=10.0), connect=loopback.connect, resolve=resolve
        )
        await use(client, server)
        await client.close()
        server.close()

    asyncio.run(run())


def test_a_connection_is_kept_for_the_same_name_and_for_no_other() -> None:
    """Its certificate was checked for that name, though the address is the same."""

    async def use(client: HttpClient, server: asyncio.Server) -> None:
        first = [(await client.get("http://a.test/")).data for _ in range(3)]
        other = (await client.get("http://b.test/")).data
        again = (await client.get("http://a.test/")).data
        assert len({*first, again}) == 1 and other not in first
        await client.close()
        assert (await client.get("http://a.test/")).data not in first

    kept(use)


def test_a_hundred_requests_at_once_keep_a_hundred_connections() -> None:
    """Closing those beyond a smaller number made every second request shake hands again."""
    opened = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened.append(writer)
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                await all_there.wait()
                writer.write(response(b"ok"))
        writer.close()

    async def use(client: HttpClient, server: asyncio.Server) -> None:
        nonlocal all_there
        for _ in range(2):
            all_there = asyncio.Barrier(100)
            await asyncio.gather(*(client.get("http://a.test/") for _ in range(100)))

    all_there = asyncio.Barrier(1)
    kept(use, handle=handle)
    assert len(opened) == 100


def test_a_kept_connection_that_its_server_closed_costs_no_request() -> None:
    """The server hangs up after each answer without saying so, or in the middle of the next."""
    seen = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        seen.append("answered")
        writer.write(response(b"ok"))
        await writer.drain()
        try:
            await reader.readuntil(b"\r\n\r\n")
            seen.append("hung up")
        except asyncio.IncompleteReadError:
            pass
        writer.close()

    async def use(client: HttpClient, server: asyncio.Server) -> None:
        for _ in range(3):
            assert (await client.get("http://a.test/")).data == b"ok"

    kept(use, handle=handle)
    assert seen == ["answered", "hung up", "answered", "hung up", "answered"]


def test_a_first_request_that_breaks_is_not_sent_again() -> None:
    seen = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        seen.append("asked")
        writer.close()

    async def use(client: HttpClient, server: asyncio.Server) -> None:
        with pytest.raises(ToolDownError):
            await client.get("http://a.test/")

    kept(use, handle=handle)
    assert seen == ["asked"]


def test_no_more_places_are_kept_than_said_and_none_in_use_is_given_up() -> None:
    async def use(client: HttpClient, server: asyncio.Server) -> None:
        for address in range(1, 80):
            await client.get(f"http://93.184.215.{address}/")
        places = client._connections._places
        assert len(places) == 64
        assert [address for _, address in places] == [f"93.184.215.{n}" for n in range(16, 80)]

    async def numbers(host: str, port: int) -> list[str]:
        return [host]

    async def run() -> None:
        server = await asyncio.start_server(keeping, "127.0.0.1", 0)
        loopback = Loopback(port=server.sockets[0].getsockname()[1])
        client = HttpClient(connect=loopback.connect, resolve=numbers)
        await use(client, server)
        await client.close()
        server.close()

    asyncio.run(run())
