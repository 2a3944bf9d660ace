"""Search services that answer JSON, described by paths, and the known ones by name.

A description says where to ask, what to send and where the results stand. In what is sent,
{query}, {top_k}, {picture} (an address) and {key} are filled in, in one pass, so that a query that
says "{key}" stays a query. Serper, SerpAPI and Jina are as documented in November 2026.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlencode

from tapo_train.data.images import extension
from tapo_train.tools.endpoints import Request, another_form, asked, json_of, value_at
from tapo_train.tools.net import HttpClient
from tapo_train.tools.search_answer import (
    FoundPicture,
    FoundText,
    found_pictures,
    found_texts,
)
from tapo_train.types import Image

__all__ = ["PICTURE_SERVICES", "TEXT_SERVICES", "PictureService", "Service"]

CONTENT_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}
_FILLED = re.compile(r"\{(query|top_k|picture|key)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A service as described in a recipe, or a known one."""

    label: str = "json"
    url: str
    method: str = "POST"
    """POST sends `request` as JSON, GET in the address."""
    request: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    results: str = "results"
    """Path of the list of results."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Paths within a result of title, text, url and thumbnail, where they have other names than
    the usual ones (`search_answer.py`)."""
    nothing: str = ""
    """Words of an answer without a list of results that mean there are none."""
    upload: str = ""
    """Where a picture is posted to get an address for {picture}."""
    uploaded: str = "url"
    """Path of that address in the answer."""
    key: str = ""

    def version(self) -> str:
        """Differs where the answers may; knows no key."""
        said = replace(self, key="", headers={})
        parts = [said.url, said.method, dict(said.request), said.results, dict(said.fields)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def sent_headers(self) -> dict[str, str]:
        """Headers with the key in them, for the service's own host alone."""
        return {name: str(self._filled(value, {})) for name, value in self.headers.items()}

    def asking(self, values: Mapping[str, str | int]) -> Request:
        """The request for a query or a picture."""
        filled = {name: self._filled(value, values) for name, value in self.request.items()}
        if self.method == "POST":
            return Request.posting(self.url, filled)
        separator = "&" if "?" in self.url else "?"
        return Request(url=f"{self.url}{separator}{urlencode(filled)}")

    def _filled(self, value: Any, values: Mapping[str, str | int]) -> Any:
        if not isinstance(value, str):
            return value
        known = {**values, "key": self.key}
        whole = _FILLED.fullmatch(value)
        if whole and whole[1] in known:
            return known[whole[1]]  # a number stays one
        return _FILLED.sub(lambda found: str(known.get(found[1], found[0])), value)

    def texts(self, data: bytes) -> list[FoundText]:
        """The results of a text search."""
        return found_texts(data, results=self.results, fields=self.fields, nothing=self.nothing)

    def pictures(self, data: bytes) -> list[FoundPicture]:
        """The results of a picture search."""
        return found_pictures(data, results=self.results, fields=self.fields, nothing=self.nothing)


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureService:
    """A service that finds pictures by their address."""

    service: Service
    client: HttpClient
    """The service's, which sends it the key."""
    uploading: HttpClient
    """For where a picture gets its address; knows no key."""

    async def found(self, image: Image) -> list[FoundPicture]:
        """What looks like the picture.

        Raises:
            ToolDownError: either server is down or answers in another form.
        """
        request = self.service.asking({"picture": await self._address(image)})
        return self.service.pictures(await asked(self.client, request))

    async def close(self) -> None:
        """Close the connections."""
        await self.client.close()
        await self.uploading.close()

    async def _address(self, image: Image) -> str:
        kind = CONTENT_TYPES[extension(image.data)]
        request = Request(url=self.service.upload, body=image.data, content_type=kind)
        data = await asked(self.uploading, request)
        address = value_at(json_of(data), self.service.uploaded)
        if not isinstance(address, str):
            raise another_form(data, f"wanted an address at {self.service.uploaded}")
        return address


TEXT_SERVICES: Mapping[str, Service] = {
    "serper": Service(
        label="serper",
        url="https://google.serper.dev/search",
        request={"q": "{query}", "num": "{top_k}"},
        headers={"X-API-KEY": "{key}"},
        results="organic",
    ),
    "serpapi": Service(
        label="serpapi",
        url="https://serpapi.com/search.json",
        method="GET",
        request={"engine": "google", "q": "{query}", "num": "{top_k}", "api_key": "{key}"},
        results="organic_results",
        nothing="hasn't returned any results",
    ),
    "jina": Service(
        label="jina",
        url="https://s.jina.ai/",
        method="GET",
        request={"q": "{query}", "num": "{top_k}"},
        headers={"Authorization": "Bearer {key}", "Accept": "application/json"},
        results="data",
    ),
}
PICTURE_SERVICES: Mapping[str, Service] = {
    "serper": Service(
        label="serper",
        url="https://google.serper.dev/lens",
        request={"url": "{picture}"},
        headers={"X-API-KEY": "{key}"},
        results="organic",
    ),
    "serpapi": Service(
        label="serpapi",
        url="https://serpapi.com/search.json",
        method="GET",
        request={"engine": "google_lens", "url": "{picture}", "api_key": "{key}"},
        results="visual_matches",
        nothing="hasn't returned any results",
    ),
}
