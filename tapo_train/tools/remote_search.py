"""Text and picture search over HTTP: the same tools for the policy, other people's answers.

    text     POST {"query": "…", "top_k": 3}
             → {"results": [{"title": "…", "text": "…" or "html": "…", "url": "…"}]}
             or, as Search-R1's `/retrieve` (`Retrieve`)
             POST {"queries": ["…"], "topk": 3, "return_scores": true}
             → {"result": [[{"document": {"id": "…", "contents": "\"Title\"\ntext"}, "score": 1}]]}
    picture  POST the encoded picture to endpoint?top_k=3
             → {"results": [{"title": "…", "thumbnail": base64 or "thumbnail_url": "…", "url": …}]}

Requests go through the guarded client, pages and thumbnails through the sandbox. An endpoint that
answers in another form (`search_answer.py`), or refuses what the recipe sends it, is down; a
thumbnail that cannot be had or is refused is left out, and its title says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pydantic import BaseModel

from tapo_train.data.images import extension
from tapo_train.errors import ToolError, ToolRefusedError
from tapo_train.tools.addresses import shown
from tapo_train.tools.base import ToolContext
from tapo_train.tools.contamination import Contamination
from tapo_train.tools.endpoints import Request, asked
from tapo_train.tools.image_search import ImageSearchArguments
from tapo_train.tools.images import indexed_image
from tapo_train.tools.net import HttpClient
from tapo_train.tools.page_text import numbered, readable
from tapo_train.tools.pages import PageReader
from tapo_train.tools.sandbox import Sandbox
from tapo_train.tools.search_answer import (
    FoundPicture,
    FoundText,
    bytes_of_base64,
    found_pictures,
    found_texts,
    retrieved_texts,
)
from tapo_train.tools.services import CONTENT_TYPES, PictureService, Service
from tapo_train.tools.text_search import TextSearchArguments
from tapo_train.types import Image, Observation

__all__ = [
    "RemoteImageSearch",
    "RemoteTextSearch",
    "Results",
    "Retrieve",
    "ServiceTexts",
    "TextForm",
]

MAX_TITLE_CHARS = 200


class TextForm(Protocol):
    """What a text search sends and reads."""

    @property
    def label(self) -> str:
        """For the tool's version."""

    def request(self, endpoint: str, query: str, *, top_k: int) -> Request:
        """What is asked."""

    def read(self, data: bytes) -> list[FoundText]:
        """What came back."""


class Results:
    """Our own form of a text search."""

    label = "endpoint"

    def request(self, endpoint: str, query: str, *, top_k: int) -> Request:
        """As the module says."""
        return Request.posting(endpoint, {"query": query, "top_k": top_k})

    def read(self, data: bytes) -> list[FoundText]:
        """What came back."""
        return found_texts(data)


class Retrieve:
    """Search-R1's form, which most retrieval servers for agents speak."""

    label = "retrieve"

    def request(self, endpoint: str, query: str, *, top_k: int) -> Request:
        """Scores asked for, since some servers know no other answer."""
        asked_for = {"queries": [query], "topk": top_k, "return_scores": True}
        return Request.posting(endpoint, asked_for)

    def read(self, data: bytes) -> list[FoundText]:
        """What came back."""
        return retrieved_texts(data)


@dataclass(frozen=True, slots=True)
class ServiceTexts:
    """A service that is described by paths; it has an address of its own."""

    service: Service

    @property
    def label(self) -> str:
        """Name and description."""
        return f"{self.service.label}:{self.service.version()}"

    def request(self, endpoint: str, query: str, *, top_k: int) -> Request:
        """As described."""
        return self.service.asking({"query": query, "top_k": top_k})

    def read(self, data: bytes) -> list[FoundText]:
        """What came back."""
        return self.service.texts(data)


class RemoteTextSearch:
    """text_search_tool whose passages come from an endpoint."""

    name = "text_search_tool"
    description = "Search the text corpus."
    arguments_model: type[BaseModel] = TextSearchArguments

    def __init__(
        self,
        endpoint: str,
        client: HttpClient,
        sandbox: Sandbox,
        contamination: Contamination,
        *,
        form: TextForm | None = None,
        pages: PageReader | None = None,
        top_k: int = 3,
        max_chars: int = 8192,
    ) -> None:
        self._endpoint = endpoint
        self._form: TextForm = form or Results()
        self._pages = pages
        self._client = client
        self._sandbox = sandbox
        self._contamination = contamination
        self._top_k = top_k
        self._max_chars = max_chars
        kept = f"top_k={top_k} max_chars={max_chars} {contamination.version}"
        kept += f" {pages.version()}" if pages else ""
        self.version = f"2 {self._form.label}={shown(endpoint)} {kept}"
        self.reads = contamination.reads

    async def run(self, arguments: TextSearchArguments, context: ToolContext) -> Observation:
        """Numbered passages, or a sentence that says there are none."""
        request = self._form.request(self._endpoint, arguments.query, top_k=self._top_k)
        data = await asked(self._client, request, query=arguments.query)
        results = self._form.read(data)[: self._top_k]
        texts = await asyncio.gather(*(self._text(found, arguments.query) for found in results))
        passages = []
        for found, text in zip(results, texts, strict=True):
            title = readable(found.title, max_chars=MAX_TITLE_CHARS)
            if self._contamination.admits(context.task, url=found.url, text=f"{title}\n{text}"):
                passages.append(f"{title}: {text}" if title else text)
        if not passages:
            return Observation(text="No results were found.")
        return Observation(text=numbered(passages, max_chars=self._max_chars))

    async def close(self) -> None:
        """Close the client's connections, and end the sandbox's workers."""
        await self._client.close()
        if self._pages is not None:
            await self._pages.close()
        await asyncio.to_thread(self._sandbox.close)

    async def _text(self, found: FoundText, query: str) -> str:
        told = await self._pages.told(query, found.url) if self._pages else ""
        if told:
            return readable(told, max_chars=self._max_chars)
        if found.text or not found.html:
            return readable(found.text, max_chars=self._max_chars)
        page = found.html.encode("utf-8", "replace")
        try:
            return await asyncio.to_thread(self._sandbox.page, page, max_chars=self._max_chars)
        except ToolRefusedError as error:
            return f"(page refused: {error})"


class RemoteImageSearch:
    """image_search_tool whose titles and thumbnails come from an endpoint.

    Args:
        thumbnail_s: [s] a thumbnail may take to fetch; less than the call may, because a slow
            one is left out, and a late call would end the trajectory.
    """

    name = "image_search_tool"
    description = "Find out what an image shows."
    arguments_model: type[BaseModel] = ImageSearchArguments

    def __init__(
        self,
        endpoint: str,
        client: HttpClient,
        sandbox: Sandbox,
        contamination: Contamination,
        *,
        service: PictureService | None = None,
        top_k: int = 3,
        thumbnail_side_px: int = 64,
        thumbnail_s: float = 10.0,
    ) -> None:
        self._service = service
        self._endpoint = endpoint
        self._client = client
        self._sandbox = sandbox
        self._contamination = contamination
        self._top_k = top_k
        self._side_px = thumbnail_side_px
        self._fetch_s = thumbnail_s
        kept = f"top_k={top_k} side={thumbnail_side_px} {contamination.version}"
        form = f"{service.service.label}:{service.service.version()}" if service else "endpoint"
        self.version = f"2 {form}={shown(endpoint)} {kept}"
        self.reads = contamination.reads | {"picture"}

    async def run(self, arguments: ImageSearchArguments, context: ToolContext) -> Observation:
        """Titles, then the thumbnails that could be had, in the same order."""
        image = indexed_image(context, arguments.img_idx, tool=self.name)
        results = [
            found
            for found in (await self._found(image))[: self._top_k]
            if self._contamination.admits(context.task, url=found.url, text=found.title)
        ]
        if not results:
            return Observation(text="No matching images were found.")
        pictures = await asyncio.gather(*(self._thumbnail(found) for found in results))
        return Observation(
            text=_titles(results, pictures),
            images=tuple(picture for picture in pictures if picture is not None),
        )

    async def close(self) -> None:
        """Close the client's connections, and end the sandbox's workers."""
        await self._client.close()
        if self._service is not None:
            await self._service.close()
        await asyncio.to_thread(self._sandbox.close)

    async def _found(self, image: Image) -> list[FoundPicture]:
        if self._service is not None:
            return await self._service.found(image)
        separator = "&" if "?" in self._endpoint else "?"
        url = f"{self._endpoint}{separator}top_k={self._top_k}"
        kind = CONTENT_TYPES[extension(image.data)]
        posted = Request(url=url, body=image.data, content_type=kind)
        return found_pictures(await asked(self._client, posted))

    async def _thumbnail(self, found: FoundPicture) -> Image | None:
        try:
            if found.thumbnail_url:
                async with asyncio.timeout(self._fetch_s):
                    data = (await self._client.get(found.thumbnail_url)).data
            else:
                data = bytes_of_base64(found.thumbnail)
            return await asyncio.to_thread(self._sandbox.picture, data, longest_px=self._side_px)
        except (ToolError, TimeoutError) as error:
            is_refused = isinstance(error, ToolRefusedError)
            self._contamination.counts[f"thumbnail_{'refused' if is_refused else 'failed'}"] += 1
            return None


def _titles(results: Sequence[FoundPicture], pictures: Sequence[Image | None]) -> str:
    lines = ["Reverse image search results:"]
    for rank, (found, picture) in enumerate(zip(results, pictures, strict=True), start=1):
        title = readable(found.title, max_chars=MAX_TITLE_CHARS)
        lines.append(f"Title {rank}: {title}{'' if picture else ' (no picture)'}")
    return "\n".join([*lines, "Thumbnails:"])
