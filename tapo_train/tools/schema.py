"""What the policy is told about a tool: an OpenAI function schema.

Shown is all that arguments are judged by. Left out is what judges nothing, as every keyword costs
tokens in every prompt: titles, examples, and that no further arguments are allowed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

__all__ = ["complaint", "function_schema", "typed_text"]

_UNSAID = {"title", "examples", "$schema", "$id", "$comment", "$defs", "definitions"}
"""Definitions are shown where they are referred to."""
_OF_ONE = {
    *("items", "contains", "additionalItems", "unevaluatedItems", "additionalProperties"),
    *("unevaluatedProperties", "propertyNames", "not", "if", "then", "else", "contentSchema"),
}
"""Keywords whose value is a schema."""
_OF_MANY = {"anyOf", "oneOf", "allOf", "prefixItems"}
_OF_NAMED = {"properties", "patternProperties", "dependentSchemas"}
_ABOUT = {"description", "default"}
"""What a schema says beside a reference in place of what is referred to."""
_MOST = 2000
"""Schemas that references may unfold to; beyond that they stay."""


def function_schema(
    name: str, description: str, arguments_model: type[BaseModel]
) -> dict[str, Any]:
    """The OpenAI function schema of a tool, references resolved where that comes to an end."""
    schema = arguments_model.model_json_schema()
    try:
        shown = _Unfolded(schema).shown(schema, ())
    except _EndlessError:
        shown = schema
    shown = {key: value for key, value in shown.items() if key not in ("title", "description")}
    parameters: dict[str, Any] = {"type": "object", "properties": shown.pop("properties", {})}
    shown.pop("type", None)
    if not shown.get("required"):
        shown.pop("required", None)
    if shown.get("additionalProperties") is False:
        del shown["additionalProperties"]
    function = {"name": name, "description": description, "parameters": parameters | shown}
    return {"type": "function", "function": function}


def typed_text(text: str, schema: Mapping[str, Any]) -> Any:
    """The value that a text stands for: itself where a text is allowed, else what it is as JSON."""
    kinds = [schema, *schema.get("anyOf", ()), *schema.get("oneOf", ())]
    named = [kind for k in kinds for kind in _as_list(k.get("type"))]
    if not named or "string" in named:
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _as_list(kind: Any) -> list[Any]:
    return kind if isinstance(kind, list) else [] if kind is None else [kind]


class _EndlessError(Exception):
    """References lead back to themselves, or to what cannot be shown in their place."""


class _Unfolded:
    """A schema with what it refers to in place of its references."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._num = 0

    def shown(self, spec: Any, inside: tuple[str, ...]) -> Any:
        """The schema, given the references that led here."""
        if not isinstance(spec, dict):
            return spec  # true or false
        self._num += 1
        if self._num > _MOST or "$dynamicRef" in spec:
            raise _EndlessError
        if "$ref" in spec:
            return self._resolved(spec, inside)
        shown: dict[str, Any] = {}
        for key, value in spec.items():
            if key in _OF_NAMED and isinstance(value, dict):
                shown[key] = {name: self.shown(inner, inside) for name, inner in value.items()}
            elif key in _OF_MANY and isinstance(value, list):
                shown[key] = [self.shown(inner, inside) for inner in value]
            elif key in _OF_ONE:
                shown[key] = self.shown(value, inside)
            elif key not in _UNSAID:
                shown[key] = value
        return shown

    def _resolved(self, spec: dict[str, Any], inside: tuple[str, ...]) -> Any:
        reference = str(spec["$ref"])
        if reference in inside:
            raise _EndlessError
        target = self.shown(self._at(reference), (*inside, reference))
        beside = self.shown({k: v for k, v in spec.items() if k != "$ref"}, inside)
        if not beside:
            return target
        if not isinstance(target, dict) or (beside.keys() & target.keys()) - _ABOUT:
            return {"allOf": [target], **beside}
        return target | beside

    def _at(self, reference: str) -> Any:
        """What a JSON pointer into this schema points to."""
        if not reference.startswith("#/"):
            raise _EndlessError
        found: Any = self._root
        for part in reference[2:].split("/"):
            part = part.replace("~1", "/").replace("~0", "~")
            try:
                found = found[int(part)] if isinstance(found, list) else found[part]
            except (KeyError, IndexError, ValueError, TypeError) as error:
                raise _EndlessError from error
        return found


def complaint(name: str, error: ValidationError) -> str:
    """What is wrong with the arguments of a call, in words for the policy."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{name}: argument {where} is missing"
    return f"{name}: {where + ': ' if where else ''}{message}, found {first['input']!r:.80}"
