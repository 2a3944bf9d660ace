"""Reading one assistant turn: `<think>`, `<tool_call>` blocks, `<answer>`.

    <think>small, zoom in</think>
    <tool_call>{"name": "text_search_tool", "arguments": {"query": "Velor"}}</tool_call>

The text is untrusted: every input gives a result, in time linear in its length, and
what is wrong with a call is said in words the policy can read.

What stands in a thought is neither call nor answer: a policy that drafts a call, or quotes
the agreed form, has not made the one or given the other. A thought that is never closed
reaches to the end of the turn.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field

from tapo_train.rollout.dialects import ReadCall, read_hermes
from tapo_train.types import JsonObject

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
THINK_TAGS = {"<think>": "</think>", "<thinking>": "</thinking>"}

_OPENING = re.compile("|".join([CALL_OPEN, ANSWER_OPEN, *THINK_TAGS]))
_JSON_TOKENS = re.compile(r'(?:[^"<\\]++|"(?:[^"\\]++|\\.)*+")*+', re.DOTALL)
"""As far as a text can be JSON, which has `<` and backslashes in strings alone."""
_NO_ANSWER = (sys.maxsize, sys.maxsize)


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

    said: str
    """The turn with its thoughts blanked out: same length, same offsets."""
    calls: tuple[ParsedCall, ...]
    answer: str | None
    """Inside the last complete `<answer>`, stripped."""


@dataclass(slots=True)
class _Blocks:
    """Where the blocks of a turn begin and end, as [start, end) of characters."""

    calls: list[tuple[int, int]] = field(default_factory=list)
    thoughts: list[tuple[int, int]] = field(default_factory=list)
    unclosed_call: int | None = None
    """Offset of the first opening tag without a closing one."""
    unclosed_thought: int | None = None


def parse_turn(text: str, read: ReadCall = read_hermes) -> ParsedTurn:
    """Read a turn.

    Blocks do not nest: a call runs to the closing tag after its JSON, or to the next closing
    tag where it is not JSON. A `<tool_call>` that is never closed, or stands in a thought that
    is never closed, is a malformed call if the turn holds neither a complete call nor an
    answer, and plain text otherwise.

    Args:
        read: the dialect that calls are written in.
    """
    blocks = _blocks(text)
    said = _blanked(text, blocks.thoughts)
    answer = _last_between(said, ANSWER_OPEN, ANSWER_CLOSE)
    calls = [_read_call(text, start, end, read) for start, end in blocks.calls]
    if not calls and answer is None and (lost := _lost_call(text, blocks)):
        calls = [lost]
    return ParsedTurn(said=said, calls=tuple(calls), answer=answer)


def _blocks(text: str) -> _Blocks:
    """From left to right, so that each tag means what it means where it stands."""
    found = _Blocks()
    position, answer = 0, (0, 0)
    while opening := _OPENING.search(text, position):
        start, position = opening.span()
        tag = opening.group()
        if tag in THINK_TAGS:
            if answer[0] <= start < answer[1]:
                continue  # an answer that speaks of the tag
            close = text.find(THINK_TAGS[tag], position)
            if close < 0:
                found.unclosed_thought = start
                found.thoughts.append((start, len(text)))
                break
            position = close + len(THINK_TAGS[tag])
            found.thoughts.append((start, position))
        elif tag == CALL_OPEN and found.unclosed_call is None:
            end = _end_of_call(text, position)
            if end is None:
                found.unclosed_call = start
                continue
            found.calls.append((start, end))
            position = end
        elif tag == ANSWER_OPEN and start >= answer[1]:
            close = text.find(ANSWER_CLOSE, position)
            # Where there is none, none is looked for again.
            answer = (text.rfind(ANSWER_OPEN, start, close), close) if close >= 0 else _NO_ANSWER
    return found


def _end_of_call(text: str, body: int) -> int | None:
    """Offset after the `</tool_call>` of a call whose body begins at `body`.

    One inside a string of JSON does not close it.
    """
    close = text.find(CALL_CLOSE, body)
    if close < 0:
        return None
    last = _JSON_TOKENS.match(text, body)
    if last and last.end() > close and text.startswith(CALL_CLOSE, last.end()):
        close = last.end() if _is_json(text[body : last.end()]) else close
    return close + len(CALL_CLOSE)


def _is_json(body: str) -> bool:
    try:
        json.loads(body)
    except (ValueError, RecursionError):
        return False
    return True


def _blanked(text: str, thoughts: list[tuple[int, int]]) -> str:
    parts, position = [], 0
    for start, end in thoughts:
        parts += [text[position:start], " " * (end - start)]
        position = end
    return "".join([*parts, text[position:]])


def _lost_call(text: str, blocks: _Blocks) -> ParsedCall | None:
    """What stands where a call should be, in a turn that says nothing else."""
    start, error = blocks.unclosed_call, f"the tool call is not closed: {CALL_CLOSE} is missing"
    if start is None and blocks.unclosed_thought is not None:
        start = text.find(CALL_OPEN, blocks.unclosed_thought)
        error = "the tool call stands inside a thought that is not closed: </think> is missing"
    if start is None or start < 0:
        return None
    return ParsedCall(name="", arguments=None, start=start, end=len(text), error=error)


def _read_call(text: str, start: int, end: int, read: ReadCall) -> ParsedCall:
    try:
        name, arguments = read(text[start + len(CALL_OPEN) : end - len(CALL_CLOSE)])
    except ValueError as error:
        return ParsedCall(name="", arguments=None, start=start, end=end, error=str(error))
    return ParsedCall(name=name, arguments=arguments, start=start, end=end)


def _last_between(text: str, start: str, end: str) -> str | None:
    """Content of the last complete block, from the nearest opening tag before its close."""
    close = text.rfind(end)
    opening = text.rfind(start, 0, close) if close >= 0 else -1
    return text[opening + len(start) : close].strip() if opening >= 0 else None
