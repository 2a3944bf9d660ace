"""Pictures that stay where they are: checked once at the start, read when somebody looks at them.

What a picture is (its digest, its size) is known of each; its bytes are read again when they are
asked for, and the last few are kept. So a data set's pictures cost no memory. At the start each
rank opens its share of them (`Share`), and all ranks learn what was found.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tapo_train.data.images import MISSING, UNREADABLE, ImageLimits, read_image, resolve_inside
from tapo_train.data.row_files import RowPlace, row_at
from tapo_train.data.rows import shown
from tapo_train.errors import DataError
from tapo_train.types import Image, ImageRef

__all__ = ["ALONE", "FilePicture", "PictureBook", "RowPicture", "Share", "StoredImage"]

RECENT_BYTES = 256 * 2**20
"""[B] of encoded pictures that a process keeps of those it read last."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredImage(Image):
    """An `Image` whose `data` is read when it is asked for.

    Raises, when `data` is asked for:
        DataError: the file has changed, or is gone.
    """

    data: bytes = field(init=False, repr=False, compare=False)
    """Never set: `__getattr__` answers."""
    read: Callable[[], bytes] = field(repr=False, compare=False)

    def __getattr__(self, name: str) -> bytes:
        if name != "data":
            raise AttributeError(name)
        return self.read()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Image) and self._what == (
            other.sha256,
            other.width,
            other.height,
            other.ref,
        )

    def __hash__(self) -> int:
        return hash(self._what)

    @property
    def _what(self) -> tuple[str, int, int, ImageRef]:
        return self.sha256, self.width, self.height, self.ref


class PicturePlace(Protocol):
    """Where a picture is; hashable, equal places are one picture."""

    def bytes(self, where: str, max_bytes: int) -> bytes:
        """Its bytes; at most one more than `max_bytes` of them. DataError if there are none."""
        ...


@dataclass(frozen=True, slots=True)
class FilePicture:
    """A picture in a file of its own."""

    path: Path
    name: str = field(compare=False)
    """As the row calls it."""

    def bytes(self, where: str, max_bytes: int) -> bytes:
        try:
            if not self.path.is_file():
                raise DataError(
                    f"{where}: picture {shown(self.name)} is not a file; looked at "
                    f"{shown(str(self.path))}",
                    kind=MISSING,
                )
            with self.path.open("rb") as stream:
                return stream.read(max_bytes + 1)
        except OSError as error:
            raise DataError(
                f"{where}: picture {shown(self.name)} cannot be read: {error.strerror}",
                kind=UNREADABLE,
            ) from error


@dataclass(frozen=True, slots=True)
class RowPicture:
    """A picture inside a row: bytes, {"bytes": …}, or base64."""

    row: RowPlace
    column: str
    number: int
    """Among the pictures of the column."""
    packed: bool = False
    """The column holds JSON text of a list of {"filename", "data": base64}."""

    def bytes(self, where: str, max_bytes: int) -> bytes:
        return embedded(entries_of(row_at(self.row, self.column), self.packed)[self.number], where)


def entries_of(cell: Any, packed: bool = False) -> list[Any]:
    """The pictures in a cell; a single one counts as a list of one.

    Raises:
        DataError: it is packed, and no JSON list.
    """
    if packed and isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError) as error:
            raise DataError(f"not valid JSON ({error}): {shown(cell)}") from error
    if cell is None:
        return []
    return cell if isinstance(cell, list) else [cell]


def embedded(entry: Any, where: str) -> bytes:
    """The bytes of an entry.

    Raises:
        DataError: it holds none.
    """
    found = shown(entry)
    if isinstance(entry, Mapping):
        entry = entry.get("bytes") or entry.get("data")
    if isinstance(entry, str):
        text = entry.partition(",")[2] if entry.startswith("data:") else entry
        try:
            entry = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise DataError(
                f"{where}: found {found}; wanted base64 ({error})", kind=UNREADABLE
            ) from error
    if not isinstance(entry, bytes) or not entry:
        raise DataError(f"{where}: found {found}; wanted embedded bytes", kind=UNREADABLE)
    return entry


@dataclass(frozen=True, slots=True)
class Share:
    """Which of the pictures one of several readers opens, and how all learn of the others'."""

    number: int
    count: int
    gather: Callable[[dict[int, Any]], Sequence[dict[int, Any]]]
    """Every reader's findings, to every reader."""


ALONE = Share(0, 1, lambda found: [found])


@dataclass(frozen=True, slots=True)
class _Known:
    sha256: str
    width: int
    height: int


class PictureBook:
    """The pictures of some task files: each place is opened once, by one of the readers.

    Args:
        also: further folders that pictures may lie in, or links and absolute paths lead to.
    """

    def __init__(
        self, limits: ImageLimits, *, also: Sequence[Path] = (), share: Share = ALONE
    ) -> None:
        self.also = also
        self._limits = limits
        self._share = share
        self._numbers: dict[PicturePlace, int] = {}
        self._places: list[PicturePlace] = []
        self._found: dict[int, _Known | DataError] = {}
        self._images: dict[str, StoredImage] = {}
        self._recent = _Recent(RECENT_BYTES)

    def from_file(self, roots: Sequence[Path], name: str, *, where: str) -> int:
        """Number of the picture `name` in one of `roots` or `also`, which no link leads out of."""
        path = resolve_inside((*roots, *self.also), name, where=where)
        return self.add(FilePicture(path, name), where=where)

    def add(self, place: PicturePlace, *, where: str, data: bytes | None = None) -> int:
        """Number of the picture at `place`, which is opened if it is this reader's turn.

        Args:
            data: its bytes, where they are at hand.
        """
        if place in self._numbers:
            return self._numbers[place]
        number = self._numbers[place] = len(self._places)
        self._places.append(place)
        if number % self._share.count == self._share.number:
            try:
                own = place.bytes(where, self._limits.max_bytes) if data is None else data
                image = read_image(own, where=where, limits=self._limits)
                self._found[number] = _Known(image.sha256, image.width, image.height)
            except DataError as error:
                self._found[number] = error
        return number

    def is_known_bad(self, number: int) -> bool:
        """Whether this reader has opened the picture in vain."""
        return isinstance(self._found.get(number), DataError)

    def settle(self) -> None:
        """Learn what the others found; every reader calls it when it has seen all rows."""
        for found in self._share.gather(dict(self._found)):
            self._found |= found

    def image(self, number: int) -> Image:
        """The picture; equal bytes are one object.

        Raises:
            DataError: it cannot be used.
        """
        found = self._found[number]
        if isinstance(found, DataError):
            raise found
        if found.sha256 not in self._images:
            place = self._places[number]
            self._images[found.sha256] = StoredImage(
                sha256=found.sha256,
                width=found.width,
                height=found.height,
                ref=ImageRef(root=f"sha256:{found.sha256}"),
                read=partial(self._recent.read, place, found.sha256, self._limits.max_bytes),
            )
        return self._images[found.sha256]


class _Recent:
    """The bytes of the pictures that were read last; safe to use from threads."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._held: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, place: PicturePlace, sha256: str, max_bytes: int) -> bytes:
        with self._lock:
            if sha256 in self._held:
                self._held.move_to_end(sha256)
                return self._held[sha256]
        data = place.bytes("picture", max_bytes)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise DataError(f"{place}: the picture has changed since the start")
        with self._lock:
            if sha256 not in self._held:
                self._held[sha256] = data
                self._bytes += len(data)
            while self._bytes > self._max_bytes and len(self._held) > 1:
                self._bytes -= len(self._held.popitem(last=False)[1])
        return data

    def __reduce__(self) -> tuple[type[_Recent], tuple[int]]:
        # Another process begins with nothing: locks do not travel, and bytes need not.
        return _Recent, (self._max_bytes,)
