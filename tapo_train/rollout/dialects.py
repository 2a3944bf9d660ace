"""How a family writes tool calls: what stands between `<tool_call>` and `</tool_call>`.

    hermes   {"name": "text_search_tool", "arguments": {"query": "Velor"}}
    xml      <function=text_search_tool>\\n<parameter=query>\\nVelor\\n</parameter>\\n</function>

The chat template's own example says which one a model was trained on (Qwen3-Coder and Qwen3.5
write xml). The text is untrusted: a reader says in words what is wrong, in linear time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NoReturn

from tapo_train.types import JsonObject

ReadCall = Callable[[str], tuple[str, JsonObject]]
"""What stands in a call -> name and arguments. Raises ValueError in words for the policy."""

CALL_KEYS = frozenset({"name", "arguments"})
_FUNCTION = re.compile(r"\s*<function=([^>\n]*)>(.*)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]*)>\n?")
_CLOSE = "</parameter>"


def read_hermes(body: str) -> tuple[str, JsonObject]:
    """A JSON object with name and arguments."""
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
        if not isinstance(value, dict):
            raise ValueError(f'wanted an object with "name" and "arguments", got {_kind(value)}')
        if not isinstance(value.get("name"), str):
            raise ValueError('"name" must be a string')
        if unknown := sorted(value.keys() - CALL_KEYS):
            raise ValueError(f'only "name" and "arguments" are allowed, got also {unknown[0]!r}')
        arguments = _object(value.get("arguments"))
        # A lone surrogate ("\\ud800") is legal JSON but cannot be written to any file.
        json.dumps([value, arguments], ensure_ascii=False).encode()
    except RecursionError as error:
        # json recurses once per bracket, and the policy chooses how many.
        raise ValueError("the tool call is not valid JSON: it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"the tool call is not valid JSON: {error}") from error
    return value["name"], arguments


def read_xml(body: str) -> tuple[str, JsonObject]:
    """A function with parameters, each of them a text; the tool's schema says what it means."""
    function = _FUNCTION.fullmatch(body)
    if function is None:
        raise ValueError(
            "the tool call cannot be read: wanted <function=NAME> with <parameter=NAME> in it, "
            "and </function> at the end"
        )
    name, inner = function.groups()
    arguments: dict[str, Any] = {}
    position = 0
    while opening := _PARAMETER.match(inner, position):
        end = inner.find(_CLOSE, opening.end())
        if end < 0:
            break
        key = opening.group(1)
        if key in arguments:
            raise ValueError(f"the tool call cannot be read: {key!r} is there twice")
        arguments[key] = inner[opening.end() : end].removesuffix("\n")
        position = end + len(_CLOSE)
    if left := inner[position:].strip():
        raise ValueError(
            "the tool call cannot be read: wanted <parameter=NAME>, a value and </parameter>, "
            f"found {left[:40]!r}"
        )
    return name, arguments


DIALECTS: dict[str, ReadCall] = {"hermes": read_hermes, "xml": read_xml}
"""By name."""


def _object(arguments: Any) -> JsonObject:
    """Arguments as the credit stage reads them, too: none may be null or "", and some are text."""
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = json.loads(arguments, parse_constant=_refuse_constant)
        except ValueError as error:
            raise ValueError(f'"arguments" must be an object, got a string ({error})') from error
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return {}
    if not isinstance(arguments, dict):
        raise ValueError(f'"arguments" must be an object, got {_kind(arguments)}')
    return arguments


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
