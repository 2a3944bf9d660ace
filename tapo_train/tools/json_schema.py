"""Arguments checked against a JSON schema that somebody else wrote."""

from __future__ import annotations

from typing import Any

from jsonschema import Draft202012Validator, SchemaError
from jsonschema.exceptions import best_match
from pydantic import BaseModel, RootModel, model_validator
from referencing import Registry, Resource
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from tapo_train.errors import ConfigError

__all__ = ["arguments_model_of"]

_FETCHES_NOTHING: Registry[Any] = Registry()
"""The library's own registry would load a reference to a URL."""


def arguments_model_of(name: str, schema: dict[str, Any]) -> type[BaseModel]:
    """A pydantic model that checks against a JSON schema and shows it.

    Raises:
        ConfigError: it is no schema of an object, or refers to something outside itself.
    """
    _require_usable(name, schema)
    validator = Draft202012Validator(schema, registry=_FETCHES_NOTHING)

    class Arguments(RootModel[dict[str, Any]]):
        @model_validator(mode="before")
        @classmethod
        def _check(cls, value: Any) -> Any:
            try:
                error = best_match(validator.iter_errors(value))
            except (ArithmeticError, RecursionError, Unresolvable) as problem:
                # A policy may write 1e999, and a schema may ask what it is a multiple of.
                raise ValueError(f"cannot be checked ({type(problem).__name__})") from problem
            if error is not None:
                where = ".".join(str(part) for part in error.absolute_path)
                raise ValueError(f"{where + ': ' if where else ''}{error.message[:200]}")
            return value

        @classmethod
        def model_json_schema(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
            return schema

    return Arguments


def _require_usable(name: str, schema: dict[str, Any]) -> None:
    try:
        Draft202012Validator.check_schema(schema)
        inside = _FETCHES_NOTHING.with_resource(
            "", Resource.from_contents(schema, default_specification=DRAFT202012)
        )
        for reference in _references(schema):
            inside.resolver("").lookup(reference)
        Draft202012Validator(schema, registry=_FETCHES_NOTHING).is_valid({})
    except (SchemaError, Unresolvable, RecursionError) as error:
        raise ConfigError(
            f"tools.mcp: the schema of {name} cannot be used ({type(error).__name__}: "
            f"{str(error)[:200]}); wanted JSON schema without references to elsewhere"
        ) from error
    if schema.get("type", "object") != "object":
        raise ConfigError(f"tools.mcp: {name} takes {schema['type']!r}, wanted an object")


def _references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value[key] for key in ("$ref", "$dynamicRef") if isinstance(value.get(key), str)]
        return own + [found for inner in value.values() for found in _references(inner)]
    if isinstance(value, list):
        return [found for inner in value for found in _references(inner)]
    return []
