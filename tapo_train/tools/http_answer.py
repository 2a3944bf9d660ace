"""How much of an HTTP answer is read, and what its status means."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from tapo_train.errors import ToolDownError, ToolError, ToolRefusedError, ToolStatusError
from tapo_train.tools.addresses import shown_text

__all__ = ["Body", "FetchLimits", "is_packed", "refusal"]

RATIO_FROM_BYTES = 64 * 1024
"""Below so many unpacked bytes no ratio is suspicious."""
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


class Body:
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


def is_packed(headers: Mapping[str, str]) -> bool:
    """Whether the body is gzip; nothing else was asked for."""
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip"):
        raise ToolDownError(
            f"the answer is encoded as {encoding[:40]!r}; only gzip was asked for", retryable=False
        )
    return encoding.endswith("gzip")


async def refusal(
    status: int,
    headers: Mapping[str, str],
    chunks: AsyncIterator[bytes],
    *,
    url: str,
    secrets: Sequence[str] = (),
) -> ToolError:
    """The error for a status that is neither success nor redirect, with what the server says."""
    said = b""
    if not is_packed(headers):
        async for chunk in chunks:
            said = (said + chunk)[:_SAID_BYTES]
            if len(said) >= _SAID_BYTES:
                break
    # Some servers repeat the key that they refuse.
    words = shown_text(said.decode("utf-8", "replace"), secrets_of=url, secrets=secrets)
    words = "".join(c if c.isprintable() else " " for c in words)
    message = f"HTTP {status} {' '.join(words.split())[:200]}".rstrip()
    if status in _BUSY or status >= 500:
        return ToolDownError(message, retry_after_s=_retry_after_s(headers))
    return ToolStatusError(message, status=status)


def _retry_after_s(headers: Mapping[str, str]) -> float:
    """[s] for which the server asks to be left alone, as a number or a date; 0: it does not."""
    said = headers.get("retry-after", "").strip()
    if said.isascii() and said.isdigit():
        return float(said[:9])
    try:
        until = parsedate_to_datetime(said)
    except ValueError:
        return 0.0
    if until.tzinfo is None:
        until = until.replace(tzinfo=UTC)
    return max(0.0, (until - datetime.now(UTC)).total_seconds())
