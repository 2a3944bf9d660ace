"""Titled pictures that are found by what they show, in memory or in a folder all ranks map.

    vectors.faiss   ROWS vectors a picture: its regions, and what is within its margin
    brightness.u8   [N, SIDE, SIDE], to decide what the vectors propose
    margins.f32     [N, 4] the box within the margin, shares
    entries.bin     header and thumbnail of each, and entries.i64 where they begin and end

A search proposes CANDIDATES pictures by their vectors and keeps those whose fine structure agrees
with the query's by MIN_AGREEMENT (`picture_match.py`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image as PilImage

from tapo_train.errors import DataError
from tapo_train.tools.images import image_from_bytes
from tapo_train.tools.index_file import TextDigest
from tapo_train.tools.picture_files import Described, described_pictures
from tapo_train.tools.picture_match import agreement, brightness_of
from tapo_train.tools.picture_vectors import (
    DIMENSIONS,
    REGIONS,
    SIDE,
    Floats,
    Pixels,
    margin_box,
    squashed,
    vectors_of,
)
from tapo_train.tools.vector_index import VectorIndex, write_vectors
from tapo_train.types import Image

__all__ = ["ImageIndex", "IndexedPicture", "build_picture_index", "write_pictures"]

MANIFEST = "picture_index.json"
FORMAT = 1
ROWS = len(REGIONS) + 1
MIN_AGREEMENT = 0.93
"""[-1..1] Below it a picture is another one; docs/results.md says what was measured."""
CANDIDATES = 10
"""Pictures whose fine structure is looked at, for each reading of the query."""
TRIED = 2
"""Regions of each from which the alignment starts."""
PROPOSED = 256
"""Vectors that are asked for: a picture is near with many of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexedPicture:
    """What a search shows of a picture."""

    title: str
    thumbnail: Image


class ImageIndex:
    """Pictures by what they show.

    Args:
        brightness: [N, SIDE, SIDE].
        margins: [N, 4].
        entries: header, thumbnail, header, … of all pictures.
        edges: [2 N + 1] where each begins in `entries`.
        digest: of all of it.
    """

    def __init__(
        self,
        vectors: VectorIndex,
        *,
        brightness: Pixels,
        margins: Floats,
        entries: Pixels,
        edges: npt.NDArray[np.int64],
        digest: str,
    ) -> None:
        self._vectors = vectors
        self._brightness = brightness
        self._margins = margins
        self._entries = entries
        self._edges = edges
        self.digest = digest

    @classmethod
    def load(cls, path: Path, *, thumbnail_side_px: int = 64) -> ImageIndex:
        """Map a folder that `build_picture_index` wrote, or read pictures into memory.

        Raises:
            DataError: neither, or damaged.
        """
        if (path / MANIFEST).exists():
            return _mapped(path)
        return cls.of(described_pictures(path, thumbnail_side_px=thumbnail_side_px))

    @classmethod
    def of(cls, pictures: Iterable[Described]) -> ImageIndex:
        """In memory."""
        held, digest = list(pictures), TextDigest()
        for picture in held:
            _digest(digest, picture)
        parts = list(chain.from_iterable((one.header, one.thumbnail) for one in held))
        vectors = [one.vectors for one in held]
        return cls(
            VectorIndex.of(np.concatenate([*vectors, np.empty((0, DIMENSIONS), np.float32)])),
            brightness=np.array([one.brightness for one in held], np.uint8),
            margins=np.array([one.margin for one in held], np.float32),
            entries=np.frombuffer(b"".join(parts), np.uint8),
            edges=np.cumsum([0, *map(len, parts)], dtype=np.int64),
            digest=digest.hex(),
        )

    def __len__(self) -> int:
        return len(self._brightness)

    def search(
        self, picture: PilImage.Image, *, top_k: int, min_agreement: float = MIN_AGREEMENT
    ) -> list[IndexedPicture]:
        """The pictures that agree best with an RGB picture, or with what is within its margin."""
        ranked = self.ranked(picture)
        return [self.entry(n) for n, agrees in ranked[:top_k] if agrees >= min_agreement]

    def ranked(self, picture: PilImage.Image) -> list[tuple[int, float]]:
        """Candidates and how well they agree (-1 to 1), best first, ties in the index's order."""
        if not len(self):
            return []
        box = margin_box(picture)
        readings = [squashed(picture)]
        if box != (0, 0, *picture.size):
            readings.append(squashed(picture.crop(box)))
        best: dict[int, float] = {}
        for reading in readings:
            for number, agrees in self._agreeing(reading):
                best[number] = max(agrees, best.get(number, -1.0))
        return sorted(best.items(), key=lambda found: (-found[1], found[0]))

    def _agreeing(self, reading: Pixels) -> list[tuple[int, float]]:
        asked = vectors_of(reading, regions=1)
        if not asked.any():
            return []
        _, rows = self._vectors.search(asked, min(PROPOSED, len(self._vectors)))
        # The nearest regions of each picture, the nearest pictures first.
        nearest: dict[int, list[int]] = {}
        for row in rows[0].tolist():
            if row >= 0 and (row // ROWS in nearest or len(nearest) < CANDIDATES):
                nearest.setdefault(row // ROWS, []).append(row % ROWS)
        tried = [(n, region) for n, regions in nearest.items() for region in regions[:TRIED]]
        numbers = [number for number, _ in tried]
        boxes = np.array([self._box(*one) for one in tried], np.float32)
        agrees = agreement(reading, np.asarray(self._brightness[numbers]), boxes)
        return list(zip(numbers, agrees.tolist(), strict=True))

    def _box(self, number: int, region: int) -> Floats:
        box: Floats = self._margins[number] if region == len(REGIONS) else REGIONS[region]
        return box

    def holds(self, number: int, title: str, picture: PilImage.Image) -> bool:
        """Whether the picture of this number has the title and shows what an RGB picture shows."""
        if number >= len(self) or self.entry(number).title != title:
            return False
        return np.array_equal(brightness_of(squashed(picture)), self._brightness[number])

    def entry(self, number: int) -> IndexedPicture:
        """Title and thumbnail of a picture.

        Raises:
            DataError: the folder was damaged.
        """
        start, middle, end = self._edges[2 * number : 2 * number + 3].tolist()
        try:
            header = json.loads(self._entries[start:middle].tobytes())
            width, height = int(header["width"]), int(header["height"])
            data = self._entries[middle:end].tobytes()
            thumbnail = image_from_bytes(data, width=width, height=height)
            return IndexedPicture(title=str(header["title"]), thumbnail=thumbnail)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"image index: entry {number} cannot be read: {error}") from error


def build_picture_index(folder: Path, source: Path, *, thumbnail_side_px: int = 256) -> int:
    """A new index in `folder`, which is there only once it is whole; how many pictures it has.

    Raises:
        DataError: the folder holds something, or a picture cannot be read.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"picture index {folder}: found something there; wanted a new folder")
    unfinished = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        pictures = described_pictures(source, thumbnail_side_px=thumbnail_side_px)
        count = write_pictures(unfinished, pictures, what=str(source))
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return count


def write_pictures(folder: Path, pictures: Iterable[Described], *, what: str) -> int:
    """The files of an index; holds a picture at a time, and FAISS's lists."""
    edges, digest, count, spool = [0], TextDigest(), 0, folder / "vectors.f16"
    with (
        spool.open("wb") as vectors,
        (folder / "brightness.u8").open("wb") as brightness,
        (folder / "margins.f32").open("wb") as margins,
        (folder / "entries.bin").open("wb") as entries,
    ):
        for count, picture in enumerate(pictures, start=1):  # noqa: B007
            vectors.write(picture.vectors.astype(np.float16).tobytes())
            brightness.write(picture.brightness.tobytes())
            margins.write(picture.margin.tobytes())
            for part in (picture.header, picture.thumbnail):
                entries.write(part)
                edges.append(edges[-1] + len(part))
            _digest(digest, picture)
    if not count:
        raise DataError(f"picture index: {what} has no pictures; wanted at least one")
    spooled = np.memmap(spool, np.float16, "r", shape=(count * ROWS, DIMENSIONS))
    write_vectors(folder / "vectors.faiss", spooled)
    spool.unlink()
    (folder / "entries.i64").write_bytes(np.array(edges, np.int64).tobytes())
    manifest = {"format": FORMAT, "pictures": count, "digest": digest.hex()}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return count


def _digest(digest: TextDigest, picture: Described) -> None:
    digest.add(picture.header.decode())
    digest.add(picture.digest)
    digest.add(hashlib.sha256(picture.thumbnail).hexdigest())


def _mapped(folder: Path) -> ImageIndex:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        found, count, digest = manifest["format"], int(manifest["pictures"]), manifest["digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: {type(error).__name__}: {error}; wanted a whole index") from error
    if found != FORMAT:
        raise DataError(f"{path}: found format {found!r}, wanted {FORMAT}: build the index again")
    edges = _numbers(folder / "entries.i64", np.int64, (2 * count + 1,))
    vectors = VectorIndex.load(folder / "vectors.faiss")
    if (len(vectors), vectors.dimensions) != (count * ROWS, DIMENSIONS):
        raise DataError(f"{folder}: found {len(vectors)} vectors, wanted {count * ROWS}")
    return ImageIndex(
        vectors,
        brightness=_numbers(folder / "brightness.u8", np.uint8, (count, SIDE, SIDE)),
        margins=_numbers(folder / "margins.f32", np.float32, (count, 4)),
        entries=_numbers(folder / "entries.bin", np.uint8, (int(edges[-1]),)),
        edges=edges,
        digest=str(digest),
    )


def _numbers(path: Path, kind: type[np.generic], shape: Sequence[int]) -> Any:
    """A file of numbers, mapped."""
    try:
        return np.memmap(path, kind, "r", shape=tuple(shape))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}; wanted {tuple(shape)} numbers") from error
