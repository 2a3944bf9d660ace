"""image_search_tool: pictures of a local index that show what a picture shows."""

from __future__ import annotations

import asyncio
from typing import Annotated

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field

from tapo_train.tools.base import ToolContext
from tapo_train.tools.images import ImageDecoder, indexed_image, number
from tapo_train.tools.look_alikes import LookAlikes
from tapo_train.tools.picture_index import ImageIndex, IndexedPicture
from tapo_train.types import Image, Observation

__all__ = ["ImageIndex", "ImageSearchArguments", "ImageSearchTool", "IndexedPicture"]

NOTHING = "No matching images were found."
LOOK_ALIKE = "These only look alike and may show something else:"
REMEMBERED = 4096
"""Pictures whose answers are kept: the rollouts of a question search the same ones."""


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
    max_threads = 2  # an index of files compares small arrays: 64 take three times the CPU of one
    arguments_model: type[BaseModel] = ImageSearchArguments

    def __init__(
        self,
        index: ImageIndex,
        decoder: ImageDecoder,
        *,
        top_k: int = 3,
        look_alikes: LookAlikes | None = None,
    ) -> None:
        self._index = index
        self._decoder = decoder
        self._top_k = top_k
        self._look_alikes = look_alikes
        self._found: dict[str, Observation] = {}
        near = "" if look_alikes is None else f" look_alikes={look_alikes.version}"
        self.version = f"2 index={index.digest} top_k={top_k}{near}"

    async def run(self, arguments: ImageSearchArguments, context: ToolContext) -> Observation:
        """Titles, then as many thumbnails in the same order."""
        image = indexed_image(context, arguments.img_idx, tool=self.name)
        found = self._found.get(image.sha256)
        if found is None:
            found = await asyncio.to_thread(self._lookup, image)
            if len(self._found) >= REMEMBERED:
                del self._found[next(iter(self._found))]
            self._found[image.sha256] = found
        return found

    def _lookup(self, image: Image) -> Observation:
        picture, said = self._decoder.decode(image), "Reverse image search results:"
        hits = self._index.search(picture, top_k=self._top_k)
        if not hits and self._look_alikes is not None:
            said = f"{NOTHING} {LOOK_ALIKE}"
            hits = self._look_alikes.near(picture, top_k=self._top_k)
        if not hits:
            return Observation(text=NOTHING)
        titles = "\n".join(f"Title {rank}: {hit.title}" for rank, hit in enumerate(hits, start=1))
        text = f"{said}\n{titles}\nThumbnails:"
        return Observation(text=text, images=tuple(hit.thumbnail for hit in hits))
