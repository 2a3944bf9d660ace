"""Where a request may go: schemes, ports, and addresses that belong to the public internet.

A name proves nothing: it may resolve to this machine, to the office network or to a cloud's
metadata service, and to something else a second later. So the address is what is judged,
after resolution, and the connection is made to that very address (`net.py`).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from tapo_train.errors import ConfigError, ToolRefusedError

SCHEMES = frozenset({"http", "https"})
PORTS = frozenset({80, 443})
"""Allowed anywhere; a named host with a port allows that port there."""

HIDDEN = "***"
SHORTEST_SECRET = 6
"""[characters] Shorter values of a query are words such as `top_k=3`."""
_MAY_HIDE = frozenset("@?#")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",
        "100.64.0.0/10",  # carriers, and some clouds' metadata
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",  # relays from IPv4 to 6to4
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "2001::/23",  # Teredo and other protocols
        "2001:db8::/32",
        "2002::/16",  # 6to4: an IPv4 address inside
        "3fff::/20",
    )
)
"""IANA's special-purpose registries, beside what `ipaddress` knows in every version of Python."""
_GLOBAL_V6 = ipaddress.ip_network("2000::/3")
"""The only IPv6 addresses in public use; outside lie mapped, translated, local ones."""
_METADATA = frozenset({ipaddress.ip_address("168.63.129.16")})
"""Cloud hosts' own services at addresses that look public (Azure)."""


@dataclass(frozen=True, slots=True)
class AllowedHosts:
    """Hosts the recipe names: they may be private, and may have a port of their own.

    Raises:
        ConfigError: an entry is not `host` or `host:port`.
    """

    entries: frozenset[tuple[str, int | None]] = frozenset()

    @classmethod
    def parse(cls, entries: Iterable[str], *, field: str = "tools.allowed_hosts") -> AllowedHosts:
        """From the recipe's `host`, `host:port` and `[v6]:port`."""
        return cls(frozenset(_entry(entry, field) for entry in entries))

    def names(self, host: str, port: int) -> bool:
        """Whether `host` is named for `port`; without a port, the usual ones are meant."""
        host = _canonical(host)
        return (host, port) in self.entries or ((host, None) in self.entries and port in PORTS)


def host_of_endpoint(url: str, *, field: str) -> str:
    """`host:port` of an endpoint of the recipe, which thereby names it.

    Raises:
        ConfigError: it is not http(s)://host[:port][/path].
    """
    wrong = ConfigError(f"{field}: found {shown(url)!r}, wanted http(s)://host[:port]/path")
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        raise wrong from None  # the error quotes a piece, which may be one of a password
    if parts.scheme not in SCHEMES or not parts.hostname or parts.username is not None:
        raise wrong
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{host}:{port}"


def shown(url: str) -> str:
    """An address as it may be written anywhere: host and path, and of a query the names.

    User, password, the query's values and the fragment, which may be secrets, are hidden.
    """
    if not _MAY_HIDE & set(url):
        return url
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host:
        return HIDDEN
    host = f"[{host}]" if ":" in host else host
    pairs = [pair.partition("=") for pair in parts.query.split("&") if pair]
    query = "&".join(f"{name}={HIDDEN}" if sign else HIDDEN for name, sign, _ in pairs)
    return urlunsplit(
        (parts.scheme, host if port is None else f"{host}:{port}", parts.path, query, "")
    )


def shown_text(text: str, *, secrets_of: str = "", secrets: Sequence[str] = ()) -> str:
    """A text as it may be written anywhere: each address in it as `shown`.

    Args:
        secrets_of: an address whose secrets are hidden wherever they stand, too.
        secrets: the same, if they are long enough to be any.
    """
    text = _ADDRESS.sub(lambda found: shown(found[0]), text)
    for secret in (*_secrets(secrets_of), *(s for s in secrets if len(s) >= SHORTEST_SECRET)):
        text = text.replace(secret, HIDDEN)
    return text


def _secrets(url: str) -> list[str]:
    """Values of a query, as written and as meant, that are too long to be anything else."""
    query = url.partition("?")[2].partition("#")[0]
    written = [pair.partition("=")[2] or pair for pair in query.split("&")]
    meant = [value for _, value in parse_qsl(query)]
    return [value for value in {*written, *meant} if len(value) >= SHORTEST_SECRET]


def require_destination(scheme: str, host: str, port: int, allowed: AllowedHosts) -> None:
    """What can be said before the name is resolved.

    Raises:
        ToolRefusedError: another scheme, no host, or a port that is neither usual nor named.
    """
    if scheme not in SCHEMES:
        raise ToolRefusedError(f"scheme {scheme!r} is not allowed; wanted http or https")
    if not host:
        raise ToolRefusedError("the address has no host")
    if port not in PORTS and not allowed.names(host, port):
        raise ToolRefusedError(f"port {port} of {host} is not allowed; wanted 80 or 443")


def require_address(text: str, host: str, port: int, allowed: AllowedHosts) -> str:
    """The address to connect to, in canonical form.

    A named host may be private or this machine, but link-local (metadata) and multicast
    addresses only count as named if they are written out.

    Raises:
        ToolRefusedError: it is not an address of the public internet.
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError as error:
        raise ToolRefusedError(f"{host} resolves to {text!r}, which is no address") from error
    reason = _reason(address)
    if reason is None:
        return str(address)
    named = allowed.names(host, port)
    written_out = _canonical(host) == str(address)
    if named and (written_out or reason in ("private", "loopback")):
        return str(address)
    raise ToolRefusedError(f"{host} is at {address}, a {reason} address; only public ones are met")


def _reason(address: Address) -> str | None:
    """Why `address` is none of the public internet's hosts; None if it is one."""
    if isinstance(address, ipaddress.IPv6Address) and (
        address.ipv4_mapped or address.sixtofour or address.teredo or address.scope_id
    ):
        return "disguised"
    if address.is_loopback:
        return "loopback"
    if address.is_link_local or address in _METADATA:
        return "link-local"
    if address.is_multicast:
        return "multicast"
    if address.is_unspecified or address.is_reserved:
        return "reserved"
    if address.version == 6 and address not in _GLOBAL_V6 and not address.is_private:
        return "reserved"
    if not address.is_global or any(address in network for network in _NOT_PUBLIC):
        return "private"
    return None


def _canonical(host: str) -> str:
    """Lower case, without the brackets of IPv6 and without the root's dot."""
    host = host.lower().strip("[]").rstrip(".")
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host


def _entry(entry: str, field: str) -> tuple[str, int | None]:
    host, port = entry, ""
    if entry.startswith("[") or entry.count(":") == 1:
        host, _, port = entry.rpartition(":") if not entry.endswith("]") else (entry, "", "")
    number = int(port) if port.isascii() and port.isdigit() else None
    if not host or any(c in host for c in "/@*?# ") or (port and number is None):
        raise ConfigError(f"{field}: found {shown(entry)!r}, wanted host or host:port")
    if number is not None and not 0 < number < 65536:
        raise ConfigError(f"{field}: found port {number} in {shown(entry)!r}, wanted 1 to 65535")
    return _canonical(host), number
