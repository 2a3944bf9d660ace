"""Reading one assistant turn: `<think>`, Hermes `<tool_call>` blocks, `<answer>`.

    <think>small, zoom in</think>
    <tool_call>{"name": "text_search_tool", "arguments": {"query": "Velor"}}</tool_call>

The text is untrusted: every input gives a result, in time linear in its length, and
what is wrong with a call is said in words the policy can read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NoReturn

from tapo_train.types import JsonObject

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
THINK_TAGS = (("<think>", "</think>"), ("<thinking>", "</thinking>"))
CALL_KEYS = frozenset({"name", "arguments"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedCall:
    """One `<tool_call>` block, readable or not."""

    name: str
    """"" if it could not be read."""
    arguments: JsonObject | None
    """None if unreadable; {} if the call has none."""
    start: int
    """Character offset of `<tool_call>`."""
    end: int
    """Offset after `</tool_call>`, or the end of the text if it is missing."""
    error: str | None = None
    """What the policy is told when the block cannot be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedTurn:
    """What a turn says."""

    think: str | None
    """Inside the first `<think>` or `<thinking>`."""
    calls: tuple[ParsedCall, ...]
    answer: str | None
    """Inside the last complete `<answer>`, stripped."""


def parse_turn(text: str) -> ParsedTurn:
    """Read a turn.

    Blocks do not nest: a block runs from its opening tag to the next closing tag. A
    `<tool_call>` that is never closed is a malformed call if the turn holds neither a
    complete call nor an answer, and plain text otherwise.
    """
    calls, unclosed = _calls(text)
    answer = _last_between(text, ANSWER_OPEN, ANSWER_CLOSE)
    if unclosed is not None and not calls and answer is None:
        error = f"the tool call is not closed: {CALL_CLOSE} is missing"
        calls = [ParsedCall(name="", arguments=None, start=unclosed, end=len(text), error=error)]
    return ParsedTurn(think=_think(text), calls=tuple(calls), answer=answer)


def _calls(text: str) -> tuple[list[ParsedCall], int | None]:
    """Complete blocks in order, and the offset of an opening tag without a closing one."""
    calls: list[ParsedCall] = []
    position = 0
    while (start := text.find(CALL_OPEN, position)) >= 0:
        body = start + len(CALL_OPEN)
        close = text.find(CALL_CLOSE, body)
        if close < 0:
            return calls, start
        position = close + len(CALL_CLOSE)
        calls.append(_read_call(text[body:close], start, position))
    return calls, None


def _read_call(body: str, start: int, end: int) -> ParsedCall:
    try:
        name, arguments = _read_body(body)
    except (ValueError, RecursionError) as error:
        # RecursionError: json recurses once per bracket, and the policy chooses how many.
        said = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
        message = f"the tool call is not valid JSON: {said}"
        return ParsedCall(name="", arguments=None, start=start, end=end, error=message)
    return ParsedCall(name=name, arguments=arguments, start=start, end=end)


def _read_body(body: str) -> tuple[str, JsonObject]:
    value = json.loads(body, parse_constant=_refuse_constant)
    if not isinstance(value, dict):
        raise ValueError(f'wanted an object with "name" and "arguments", got {_kind(value)}')
    if not isinstance(value.get("name"), str):
        raise ValueError('"name" must be a string')
    if unknown := sorted(value.keys() - CALL_KEYS):
        raise ValueError(f'only "name" and "arguments" are allowed, got also {unknown[0]!r}')
    arguments = value.get("arguments", {})
    if not isinstance(arguments, dict):
        raise ValueError(f'"arguments" must be an object, got {_kind(arguments)}')
    # A lone surrogate ("\ud800") is legal JSON but cannot be written to any file.
    json.dumps(value, ensure_ascii=False).encode()
    return value["name"], arguments


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _think(text: str) -> str | None:
    found = [(text.find(start), start, end) for start, end in THINK_TAGS]
    for position, start, end in sorted(item for item in found if item[0] >= 0):
        body = position + len(start)
        close = text.find(end, body)
        if close >= 0:
            return text[body:close].strip()
    return None


def _last_between(text: str, start: str, end: str) -> str | None:
    """Content of the last complete block, from the nearest opening tag before its close."""
    close = text.rfind(end)
    opening = text.rfind(start, 0, close) if close >= 0 else -1
    return text[opening + len(start) : close].strip() if opening >= 0 else None
