"""A served model (OpenAI-compatible) as a tool that no policy sees: messages in, a message out.

So it has what tools have: retries, seats, a price, and answers from a recording. What it answers is
hostile: it is read as data, and whatever is not of the form is a failure of the endpoint.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tapo_train.data.images import extension
from tapo_train.errors import ToolDownError
from tapo_train.tools.base import ToolContext
from tapo_train.tools.net import HttpClient
from tapo_train.types import Image, Observation

__all__ = ["MODEL", "Function", "Message", "OutsideModel"]

MODEL = "outside_model"
_MEDIA = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}


class Asked(BaseModel):
    """What the model is asked; pictures stand as their places in the conversation."""

    messages: list[dict[str, Any]]
    attempt: int
    """Tells equal questions of several attempts apart, and seeds the sampling."""


class Function(BaseModel):
    model_config = ConfigDict(extra="ignore")
    name: str
    arguments: str | None = None


class _Call(BaseModel):
    model_config = ConfigDict(extra="ignore")
    id: str = ""
    function: Function


class Message(BaseModel):
    """What a model's answer has to hold."""

    model_config = ConfigDict(extra="ignore")
    content: str | None = None
    tool_calls: list[_Call] | None = None


class OutsideModel:
    """The endpoint as a tool: messages in, the answer's message as JSON out.

    Args:
        endpoint: http(s)://host[:port]/v1; `/chat/completions` is added.
        model: as the endpoint calls it.
        tools: schemas of the tools it may call.
        options: of the request beside model, messages, tools and seed.
    """

    name = MODEL
    description = "Go on with a conversation."
    arguments_model: type[BaseModel] = Asked
    reads = frozenset({"pictures"})

    def __init__(
        self,
        client: HttpClient,
        *,
        endpoint: str,
        model: str,
        tools: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
    ) -> None:
        self._client = client
        self._endpoint = endpoint.rstrip("/") + "/chat/completions"
        self._body = {"model": model, **options, **({"tools": list(tools)} if tools else {})}
        said = json.dumps(self._body, sort_keys=True)
        self.version = hashlib.sha256(said.encode()).hexdigest()[:16]

    async def run(self, arguments: Asked, context: ToolContext) -> Observation:
        """Ask.

        Raises:
            ToolDownError: the endpoint is down, or its answer is no message.
        """
        messages = [_filled(message, context.images) for message in arguments.messages]
        body = {**self._body, "messages": messages, "seed": arguments.attempt}
        fetched = await self._client.post(
            self._endpoint, json.dumps(body).encode(), content_type="application/json"
        )
        return Observation(text=_read(fetched.data))

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()


def _filled(message: Mapping[str, Any], images: Sequence[Image]) -> Mapping[str, Any]:
    """The message with its pictures in place of their numbers."""
    parts = message.get("content")
    if not isinstance(parts, list):
        return message
    content = [_picture(images[part["picture"]]) if "picture" in part else part for part in parts]
    return {**message, "content": content}


def _picture(image: Image) -> dict[str, Any]:
    data = image.data
    coded = base64.b64encode(data).decode()
    url = f"data:{_MEDIA[extension(data)]};base64,{coded}"
    return {"type": "image_url", "image_url": {"url": url}}


def _read(data: bytes) -> str:
    """The message and the number of tokens of a chat completion, as JSON of known form."""
    try:
        said = json.loads(data)
        message = Message.model_validate(said["choices"][0]["message"])
        usage = said.get("usage") or {}
        tokens = usage.get("completion_tokens") if isinstance(usage, dict) else 0
    except (ValueError, KeyError, IndexError, TypeError, RecursionError, ValidationError) as error:
        raise ToolDownError(f"the model's answer is no chat completion: {data[:120]!r}") from error
    known = tokens if isinstance(tokens, int) and 0 <= tokens < 2**31 else 0
    return json.dumps({"message": message.model_dump(), "tokens": known})
