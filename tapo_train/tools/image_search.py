"""image_search_tool: pictures of a local index that show what a picture shows."""

from __future__ import annotations

import asyncio
from typing import Annotated

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field

from tapo_train.tools.base import ToolContext
from tapo_train.tools.images import ImageDecoder, indexed_image, number
from tapo_train.tools.picture_index import ImageIndex, IndexedPicture
from tapo_train.types import Image, Observation

__all__ = ["ImageIndex", "ImageSearchArguments", "ImageSearchTool", "IndexedPicture"]

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

    def __init__(self, index: ImageIndex, decoder: ImageDecoder, *, top_k: int = 3) -> None:
        self._index = index
        self._decoder = decoder
        self._top_k = top_k
        self._found: dict[str, list[IndexedPicture]] = {}
        self.version = f"2 index={index.digest} top_k={top_k}"

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
        return self._index.search(self._decoder.decode(image), top_k=self._top_k)
