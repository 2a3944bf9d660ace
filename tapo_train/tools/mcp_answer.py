"""What the policy is shown of an MCP server's answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mcp.types import (
    BlobResourceContents,
    EmbeddedResource,
    ImageContent,
    ResourceLink,
    TextContent,
    TextResourceContents,
)

__all__ = ["Answer", "read_answer"]


@dataclass(slots=True)
class Answer:
    """Text, and encoded pictures in base64, of an answer's parts in order."""

    lines: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    left_out: int = 0
    """Parts that are neither."""

    @property
    def text(self) -> str:
        """All lines, and how much is missing."""
        lines = [line for line in self.lines if line]
        if self.left_out:
            lines.append(f"[{self.left_out} parts that are neither text nor picture are left out]")
        return "\n".join(lines)


def read_answer(content: Sequence[Any], structured: Any) -> Answer:
    """The parts of a result, and its structured content where no part repeats that."""
    answer = Answer()
    for block in content:
        _add(answer, block)
    if structured is not None and not _is_said(structured, answer.lines):
        answer.lines.append(json.dumps(structured, ensure_ascii=False))
    return answer


def _add(answer: Answer, block: Any) -> None:
    if isinstance(block, EmbeddedResource):
        block = block.resource
    if isinstance(block, TextContent | TextResourceContents):
        answer.lines.append(block.text)
    elif isinstance(block, ImageContent):
        answer.pictures.append(block.data)
    elif isinstance(block, BlobResourceContents) and (block.mime_type or "").startswith("image/"):
        answer.pictures.append(block.blob)
    elif isinstance(block, ResourceLink):
        about = f": {block.description}" if block.description else ""
        answer.lines.append(f"{block.title or block.name} ({block.uri}){about}")
    else:
        answer.left_out += 1


def _is_said(structured: Any, lines: Sequence[str]) -> bool:
    """Whether text repeats it, as servers do for older clients: as JSON, or the one value in it."""
    if structured in ({}, {"result": None}):
        return True
    values = [structured]
    if isinstance(structured, dict) and len(structured) == 1:
        values += structured.values()
    spoken = [*map(_read, lines), [_read(line) for line in lines]]
    return any(value == said for value in values for said in [*lines, *spoken])


def _read(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line
