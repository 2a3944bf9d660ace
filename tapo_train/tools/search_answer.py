"""What search services answer, read for what it says: JSON with a list of results.

    {"results": [{"title": "…", "text": "…" or "html": "…", "url": "…"}]}
    {"results": [{"title": "…", "thumbnail": base64 or data: or an address, "url": "…"}]}
    {"result": [[{"document": {"id": "…", "contents": "\"Title\"\ntext"}, "score": 1.5}]]}

The last is Search-R1's `/retrieve`: a list of results for each query; without scores the documents
themselves stand in it.

Services differ in names (`content`, `snippet`), leave fields out or null, cut texts within a
character and put a byte order mark in front. None of that makes an answer wrong; an answer without
`results`, or whose results hold nothing to show, is a back end out of order.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tapo_train.errors import ToolRefusedError
from tapo_train.tools.corpus import title_and_text
from tapo_train.tools.endpoints import ABSENT, another_form, json_of, value_at

__all__ = [
    "FoundPicture",
    "FoundText",
    "bytes_of_base64",
    "found_pictures",
    "found_texts",
    "retrieved_texts",
]

TITLES = ("title", "name")
TEXTS = ("text", "content", "snippet", "description", "contents", "passage", "body")
PAGES = ("html", "raw_html")
ADDRESSES = ("url", "link", "href")
THUMBNAILS = ("thumbnail", "thumbnail_url", "thumbnailUrl", "image", "image_url", "imageUrl")
_DATA_URL = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)
_WEB = re.compile(r"https?://", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundText:
    """One result of a text search; "" is what it does not say."""

    title: str
    text: str
    html: str
    url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundPicture:
    """One result of a picture search; "" is what it does not say."""

    title: str
    thumbnail: str
    """Encoded picture in base64, with or without `data:…;base64,`."""
    thumbnail_url: str
    """Where it can be fetched; "" if it is there."""
    url: str


def found_texts(
    data: bytes,
    *,
    results: str = "results",
    fields: Mapping[str, str] | None = None,
    nothing: str = "",
) -> list[FoundText]:
    """The results of a text search, in order.

    Args:
        results: path of their list.
        fields: paths of title, text, html and url within a result; none: by their usual names.
        nothing: words of an answer without a list that mean there are none.

    Raises:
        ToolDownError: another form, or results without anything to read.
    """
    found = _results(data, results, nothing=nothing)
    return _readable(data, [_found_text(_renamed(result, fields or {})) for result in found])


def retrieved_texts(data: bytes) -> list[FoundText]:
    """The documents that Search-R1's `/retrieve` found for one query, in order.

    Raises:
        ToolDownError: another form, or documents without anything to read.
    """
    hits = _results(data, "result", is_per_query=True)
    return _readable(data, [_found_text(_document(hit)) for hit in hits])


def _document(hit: Mapping[str, Any]) -> Mapping[str, Any]:
    document = hit.get("document", hit)
    if not isinstance(document, dict):
        return {"contents": document}
    contents = document.get("contents")
    if isinstance(contents, str) and not (_said(document, TITLES) or document.get("text")):
        title, text = title_and_text(contents)
        return document | {"title": title, "text": text}
    return document


def _found_text(result: Mapping[str, Any]) -> FoundText:
    return FoundText(
        title=_said(result, TITLES),
        text=_said(result, TEXTS),
        html=_said(result, PAGES),
        url=_said(result, ADDRESSES),
    )


def _readable(data: bytes, found: list[FoundText]) -> list[FoundText]:
    if found and not any(result.text or result.html for result in found):
        raise another_form(data, f"its {len(found)} results hold neither text nor html")
    return found


def found_pictures(
    data: bytes,
    *,
    results: str = "results",
    fields: Mapping[str, str] | None = None,
    nothing: str = "",
) -> list[FoundPicture]:
    """The results of a picture search, in order; arguments as of `found_texts`.

    Raises:
        ToolDownError: another form, or results without anything to see.
    """
    found = []
    for result in (_renamed(one, fields or {}) for one in _results(data, results, nothing=nothing)):
        said = [text for name in THUMBNAILS if (text := _text(result.get(name)))]
        inside = next((text for text in said if not _WEB.match(text)), "")
        there = next((text for text in said if _WEB.match(text)), "")
        found.append(
            FoundPicture(
                title=_said(result, TITLES),
                thumbnail=inside,
                thumbnail_url="" if inside else there,
                url=_said(result, ADDRESSES),
            )
        )
    if found and not any(r.title or r.thumbnail or r.thumbnail_url for r in found):
        raise another_form(data, f"its {len(found)} results hold neither title nor thumbnail")
    return found


def bytes_of_base64(text: str) -> bytes:
    """What base64 says, as any library writes it: a data: URL, line ends, no padding, `-` and `_`.

    Raises:
        ToolRefusedError: it is no base64.
    """
    written = "".join(_DATA_URL.sub("", text, count=1).split()).rstrip("=")
    written = written.replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(written + "=" * (-len(written) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ToolRefusedError(f"a picture that is no base64: {error}") from error


def _results(
    data: bytes, path: str, *, nothing: str = "", is_per_query: bool = False
) -> list[Mapping[str, Any]]:
    answer = json_of(data)
    results = value_at(answer, path)
    if results is ABSENT:
        if nothing and nothing.encode() in data:
            return []
        raise another_form(data, f"wanted an object with {path}")
    if is_per_query and isinstance(results, list) and results:
        if len(results) > 1:
            raise another_form(data, f"{path}: found {len(results)} lists for one query")
        results = results[0]
    if results is None:  # how some languages write an empty list
        return []
    if not isinstance(results, list):
        raise another_form(data, f"{path}: found {type(results).__name__}, wanted a list")
    objects: list[Mapping[str, Any]] = [result for result in results if isinstance(result, dict)]
    if any(result is not None for result in results) and not objects:
        raise another_form(data, f"{path}: wanted objects")
    return objects


def _renamed(result: Mapping[str, Any], fields: Mapping[str, str]) -> Mapping[str, Any]:
    """A result with what stands at the paths of `fields` under their names."""
    if not fields:
        return result
    found = {name: value_at(result, path) for name, path in fields.items()}
    return {name: value for name, value in found.items() if value is not ABSENT}


def _said(result: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The first of the fields that says something."""
    return next((text for name in names if (text := _text(result.get(name)))), "")


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value.strip()
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number else ""
