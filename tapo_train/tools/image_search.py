"""image_search_tool: near-duplicate lookup in a local index of perceptual hashes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
from PIL import Image as PilImage
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field

from tapo_train.data.images import FORMATS
from tapo_train.errors import DataError
from tapo_train.tools.base import ToolContext
from tapo_train.tools.images import (
    ImageDecoder,
    encode_png,
    image_from_bytes,
    indexed_image,
    number,
    on_white,
)
from tapo_train.tools.index_file import digest_of, index_lines
from tapo_train.tools.picture_hash import index_hash, lookup_hashes
from tapo_train.types import Image, Observation


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexedPicture:
    """One entry of an image index."""

    title: str
    hash: int
    """64-bit perceptual hash."""
    thumbnail: Image


class ImageIndex:
    """Exhaustive Hamming search over 64-bit hashes; exact, and fast to about a million."""

    def __init__(self, entries: Sequence[IndexedPicture]) -> None:
        self._entries = tuple(entries)
        self.digest = digest_of(
            text
            for entry in entries
            for text in (entry.title, f"{entry.hash:016x}", entry.thumbnail.sha256)
        )
        self._hashes = np.array([entry.hash for entry in entries], dtype=np.uint64)

    @classmethod
    def load(cls, path: Path, *, thumbnail_side_px: int = 64) -> ImageIndex:
        """Read `image_index.jsonl`: one {"title", "image"} per line, paths beside the file."""
        root, lines = path.parent.resolve(), index_lines(path, "image index")
        return cls([_entry(line, root, thumbnail_side_px, where=where) for where, line in lines])

    def search(
        self, hashes: Sequence[int], *, top_k: int, max_distance: int
    ) -> list[IndexedPicture]:
        """Entries within `max_distance` bits of any of `hashes`, nearest first, ties in order."""
        if not self._entries:
            return []
        distance = self._distance(hashes)
        nearest = np.argsort(distance, kind="stable")[:top_k]
        return [self._entries[index] for index in nearest if distance[index] <= max_distance]

    def _distance(self, hashes: Sequence[int]) -> npt.NDArray[np.uint8]:
        queries = np.array(hashes, dtype=np.uint64)
        bits: npt.NDArray[np.uint8] = np.bitwise_count(queries[:, None] ^ self._hashes[None, :])
        nearest: npt.NDArray[np.uint8] = bits.min(axis=0)
        return nearest


REMEMBERED = 4096
"""Pictures whose hits are kept: the rollouts of a question search the same ones."""


class ImageSearchArguments(BaseModel):
    """Arguments of image_search_tool."""

    model_config = ConfigDict(extra="ignore")

    img_idx: Annotated[
        int,
        BeforeValidator(number),
        Field(
            description="image number, from 0",
            validation_alias=AliasChoices("img_idx", "image_index"),
        ),
    ] = 0


class ImageSearchTool:
    """Look a picture of the conversation up; titles and thumbnails of what looks the same."""

    name = "image_search_tool"
    description = "Find out what an image shows."
    reads = frozenset({"picture"})
    arguments_model: type[BaseModel] = ImageSearchArguments

    def __init__(
        self,
        index: ImageIndex,
        decoder: ImageDecoder,
        *,
        top_k: int = 3,
        max_distance: int = 6,
    ) -> None:
        self._index = index
        self._decoder = decoder
        self._top_k = top_k
        self._max_distance = max_distance
        self._found: dict[str, list[IndexedPicture]] = {}
        self.version = f"1 index={index.digest} top_k={top_k} max_distance={max_distance}"

    async def run(self, arguments: ImageSearchArguments, context: ToolContext) -> Observation:
        """Titles, then as many thumbnails in the same order."""
        image = indexed_image(context, arguments.img_idx, tool=self.name)
        hits = self._found.get(image.sha256)
        if hits is None:
            hits = await asyncio.to_thread(self._lookup, image)
            if len(self._found) >= REMEMBERED:
                del self._found[next(iter(self._found))]
            self._found[image.sha256] = hits
        if not hits:
            return Observation(text="No matching images were found.")
        titles = "\n".join(f"Title {rank}: {hit.title}" for rank, hit in enumerate(hits, start=1))
        text = f"Reverse image search results:\n{titles}\nThumbnails:"
        return Observation(text=text, images=tuple(hit.thumbnail for hit in hits))

    def _lookup(self, image: Image) -> list[IndexedPicture]:
        hashes = lookup_hashes(self._decoder.decode(image))
        return self._index.search(hashes, top_k=self._top_k, max_distance=self._max_distance)


def _entry(line: str, root: Path, side_px: int, *, where: str) -> IndexedPicture:
    try:
        row = json.loads(line)
        title, name = str(row["title"]), str(row["image"])
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise ValueError(f"path {name!r} leads out of {root}")
        with PilImage.open(path, formats=FORMATS) as encoded:
            pixels = on_white(encoded)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f'{where}: {type(error).__name__}: {error}; wanted {{"title", "image"}} '
            "with a readable picture"
        ) from error
    small = pixels.copy()
    small.thumbnail((side_px, side_px), PilImage.Resampling.LANCZOS)
    thumbnail = image_from_bytes(encode_png(small), width=small.width, height=small.height)
    return IndexedPicture(title=title, hash=index_hash(pixels), thumbnail=thumbnail)
