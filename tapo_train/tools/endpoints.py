"""Asking a server of the recipe for JSON, and reading its answer.

What a server says may be anything: an answer of another form is a back end out of order
(`ToolDownError`), never an empty result.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tapo_train.errors import ToolDownError, ToolRefusedError, ToolStatusError
from tapo_train.tools.net import HttpClient

__all__ = ["ABSENT", "Request", "another_form", "asked", "completion_of", "json_of", "value_at"]

ABOUT_THE_QUERY = frozenset({400, 413, 414})
"""Statuses of an endpoint that judge what the policy asked for; any other 4xx judges the recipe."""
_ABOUT_THE_ACCOUNT = re.compile(
    r"credit|quota|billing|payment|subscription|balance|api.?key|unauthori[sz]ed|expired", re.I
)
"""What services say with status 400 where they mean 401 or 402."""
_JSON = "application/json"
ABSENT = object()
"""What `value_at` finds where there is nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request: a GET without a body, a POST with one."""

    url: str
    body: bytes | None = None
    content_type: str = _JSON

    @classmethod
    def posting(cls, url: str, value: object) -> Request:
        """JSON."""
        return cls(url=url, body=json.dumps(value).encode())


async def asked(client: HttpClient, request: Request, *, query: str = "") -> bytes:
    """The answer of an endpoint of the recipe.

    Args:
        query: the policy's words, which a server may repeat.

    Raises:
        ToolStatusError: it says "no" to what the policy asks for.
        ToolDownError: it is down, or says "no" to the recipe: to its key, its path, its form.
    """
    try:
        if request.body is None:
            return (await client.get(request.url)).data
        fetched = await client.post(request.url, request.body, content_type=request.content_type)
        return fetched.data
    except ToolStatusError as error:
        words = str(error).replace(query, "")
        if error.status in ABOUT_THE_QUERY and not _ABOUT_THE_ACCOUNT.search(words):
            raise
        raise ToolDownError(
            f"its endpoint refuses the recipe's requests (key, account, address or form): {error}",
            retryable=False,
        ) from error
    except ToolRefusedError as error:
        # Where the endpoint leads is not the policy's doing either.
        raise ToolDownError(f"its endpoint: {error}", retryable=False) from error


def json_of(data: bytes) -> Any:
    """What an answer says; half a character or a byte order mark make none wrong.

    Raises:
        ToolDownError: it is not JSON.
    """
    try:
        return json.loads(data.decode(json.detect_encoding(data), "replace"))
    except (ValueError, RecursionError) as error:
        raise another_form(data, f"it is not JSON ({type(error).__name__}: {error})") from error


def another_form(data: bytes, problem: str) -> ToolDownError:
    """The error about an answer; asking again would give another such."""
    said = f"its answer of {len(data)} bytes has another form: {problem}"
    return ToolDownError(said[:300], retryable=False)


def value_at(value: Any, path: str) -> Any:
    """What stands at a path such as `data.items.0.name`; ABSENT where there is nothing."""
    for step in path.split("."):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif _is_list(value) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return ABSENT
    return value


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def completion_of(data: bytes, *, who: str) -> str:
    """The text of an OpenAI-compatible chat completion.

    Args:
        who: begins the message of an error: "the judge".

    Raises:
        ToolDownError: it is none; a language model may answer better the next time.
    """
    try:
        text = value_at(json_of(data), "choices.0.message.content")
    except ToolDownError as error:
        raise ToolDownError(f"{who}'s answer is no chat completion: {data[:120]!r}") from error
    if text is ABSENT:
        raise ToolDownError(f"{who}'s answer is no chat completion: {data[:120]!r}")
    if not isinstance(text, str):
        raise ToolDownError(f"{who}'s answer has no text: {data[:120]!r}")
    return text
