"""What the policy is told about a tool: an OpenAI function schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

_KEPT = {"const", "default", "description", "enum", "maximum", "minimum", "required", "type"}
"""Every keyword costs tokens in every prompt: titles and lengths are left out, a description
says more."""

_DEPTH = 16
"""Deepest nesting that is shown; a model that contains itself has no end."""


def function_schema(
    name: str, description: str, arguments_model: type[BaseModel]
) -> dict[str, Any]:
    """The OpenAI function schema of a tool, references resolved, generated titles left out."""
    schema = arguments_model.model_json_schema()
    shown = _shown(schema, schema.get("$defs", {}), depth=0)
    parameters: dict[str, Any] = {"type": "object", "properties": shown.get("properties", {})}
    if shown.get("required"):
        parameters["required"] = shown["required"]
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


def _shown(spec: Any, definitions: Mapping[str, Any], *, depth: int) -> Any:
    if not isinstance(spec, dict) or depth > _DEPTH:
        return spec if not isinstance(spec, dict) else {}
    if "$ref" in spec:
        name = str(spec["$ref"]).rpartition("/")[2]
        spec = {**definitions.get(name, {}), **{k: v for k, v in spec.items() if k != "$ref"}}
    shown: dict[str, Any] = {}
    for key, value in spec.items():
        if key == "properties":
            shown[key] = {
                name: _shown(inner, definitions, depth=depth + 1) for name, inner in value.items()
            }
        elif key == "anyOf":
            shown[key] = [_shown(inner, definitions, depth=depth + 1) for inner in value]
        elif key in ("items", "additionalProperties"):
            shown[key] = _shown(value, definitions, depth=depth + 1)
        elif key in _KEPT:
            shown[key] = value
    return shown


def complaint(name: str, error: ValidationError) -> str:
    """What is wrong with the arguments of a call, in words for the policy."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{name}: argument {where} is missing"
    return f"{name}: {where + ': ' if where else ''}{message}, found {first['input']!r:.80}"
