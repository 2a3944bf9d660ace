"""Text and picture search over HTTP: the same tools for the policy, other people's answers.

    text     POST {"query": "…", "top_k": 3}
             → {"results": [{"title": "…", "text": "…" or "html": "…", "url": "…"}]}
    picture  POST the encoded picture to endpoint?top_k=3
             → {"results": [{"title": "…", "thumbnail": base64 or "thumbnail_url": "…", "url": …}]}

Requests go through the guarded client, pages and thumbnails through the sandbox. A back end
whose answer has another form is down; a thumbnail that cannot be had or is refused is left out,
and its title says so.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Sequence
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from tapo_train.data.images import extension
from tapo_train.errors import ToolDownError, ToolError, ToolRefusedError
from tapo_train.tools.addresses import shown
from tapo_train.tools.base import ToolContext
from tapo_train.tools.contamination import Contamination
from tapo_train.tools.image_search import ImageSearchArguments
from tapo_train.tools.images import indexed_image
from tapo_train.tools.net import HttpClient
from tapo_train.tools.page_text import CUT, readable
from tapo_train.tools.sandbox import Sandbox
from tapo_train.tools.text_search import TextSearchArguments
from tapo_train.types import Image, Observation

__all__ = ["RemoteImageSearch", "RemoteTextSearch"]

Found = TypeVar("Found", bound=BaseModel)

MAX_TITLE_CHARS = 200
_CONTENT_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}


class FoundText(BaseModel):
    """One result of a text search."""

    model_config = ConfigDict(extra="ignore")
    title: str = ""
    text: str = ""
    html: str = ""
    url: str = ""


class FoundPicture(BaseModel):
    """One result of a picture search."""

    model_config = ConfigDict(extra="ignore")
    title: str = ""
    thumbnail: str = ""
    """Encoded picture in base64."""
    thumbnail_url: str = ""
    url: str = ""


class FoundTexts(BaseModel):
    """A text search's answer."""

    results: list[FoundText]


class FoundPictures(BaseModel):
    """A picture search's answer."""

    results: list[FoundPicture]


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
        top_k: int = 3,
        max_chars: int = 8192,
    ) -> None:
        self._endpoint = endpoint
        self._client = client
        self._sandbox = sandbox
        self._contamination = contamination
        self._top_k = top_k
        self._max_chars = max_chars
        kept = f"top_k={top_k} max_chars={max_chars} {contamination.version}"
        self.version = f"1 endpoint={shown(endpoint)} {kept}"
        self.reads = contamination.reads

    async def run(self, arguments: TextSearchArguments, context: ToolContext) -> Observation:
        """Numbered passages, or a sentence that says there are none."""
        request = json.dumps({"query": arguments.query, "top_k": self._top_k}).encode()
        answer = await self._client.post(self._endpoint, request, content_type="application/json")
        passages = []
        for found in _parsed(FoundTexts, answer.data).results[: self._top_k]:
            title, text = readable(found.title, max_chars=MAX_TITLE_CHARS), await self._text(found)
            if self._contamination.admits(context.task, url=found.url, text=f"{title}\n{text}"):
                passages.append(f"{title}: {text}" if title else text)
        if not passages:
            return Observation(text="No results were found.")
        text = "\n".join(f"{rank}. {passage}" for rank, passage in enumerate(passages, start=1))
        if len(text) > self._max_chars:
            text = text[: self._max_chars] + CUT
        return Observation(text=text)

    def close(self) -> None:
        """End the sandbox's worker."""
        self._sandbox.close()

    async def _text(self, found: FoundText) -> str:
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
        top_k: int = 3,
        thumbnail_side_px: int = 64,
        thumbnail_s: float = 10.0,
    ) -> None:
        self._endpoint = endpoint
        self._client = client
        self._sandbox = sandbox
        self._contamination = contamination
        self._top_k = top_k
        self._side_px = thumbnail_side_px
        self._fetch_s = thumbnail_s
        kept = f"top_k={top_k} side={thumbnail_side_px} {contamination.version}"
        self.version = f"1 endpoint={shown(endpoint)} {kept}"
        self.reads = contamination.reads | {"picture"}

    async def run(self, arguments: ImageSearchArguments, context: ToolContext) -> Observation:
        """Titles, then the thumbnails that could be had, in the same order."""
        image = indexed_image(context, arguments.img_idx, tool=self.name)
        separator = "&" if "?" in self._endpoint else "?"
        answer = await self._client.post(
            f"{self._endpoint}{separator}top_k={self._top_k}",
            image.data,
            content_type=_CONTENT_TYPES[extension(image.data)],
        )
        results = [
            found
            for found in _parsed(FoundPictures, answer.data).results[: self._top_k]
            if self._contamination.admits(context.task, url=found.url, text=found.title)
        ]
        if not results:
            return Observation(text="No matching images were found.")
        pictures = await asyncio.gather(*(self._thumbnail(found) for found in results))
        return Observation(
            text=_titles(results, pictures),
            images=tuple(picture for picture in pictures if picture is not None),
        )

    def close(self) -> None:
        """End the sandbox's worker."""
        self._sandbox.close()

    async def _thumbnail(self, found: FoundPicture) -> Image | None:
        try:
            if found.thumbnail_url and not found.thumbnail:
                async with asyncio.timeout(self._fetch_s):
                    data = (await self._client.get(found.thumbnail_url)).data
            else:
                data = _from_base64(found.thumbnail)
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


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ToolRefusedError(f"a thumbnail that is no base64: {error}") from error


def _parsed(model: type[Found], data: bytes) -> Found:
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ToolDownError(
            f"its answer of {len(data)} bytes has another form: {where} {first['msg']}"[:300],
            retryable=False,
        ) from error
