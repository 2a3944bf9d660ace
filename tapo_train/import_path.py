"""Parts by import path, `package.module:name`, checked before anything heavy starts.

What stands there is a function, which is called with the recipe's arguments beside what the run
hands it, or a class, which is made with them and whose instance is called. Naming a part is
running the code of its module.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUndefinedAnnotation

from tapo_train.errors import ConfigError

__all__ = ["construct", "is_async", "load", "make"]


def load(path: str, *, where: str) -> Any:
    """What stands at `package.module:name`.

    Args:
        where: the recipe's field, for the message.

    Raises:
        ConfigError: there is no such module or name, or the module cannot be imported.
    """
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise ConfigError(f"{where}: found {path!r}, wanted package.module:name")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise ConfigError(
            f"{where}: {path} cannot be imported ({type(error).__name__}: {error}); "
            "wanted a module on the Python path (the working directory is)"
        ) from error


def construct(found: Any, arguments: Mapping[str, Any], *, where: str) -> Any:
    """What a class or a function gives when it is called with `arguments` alone.

    Raises:
        ConfigError: an argument is unknown, missing or of a wrong type.
    """
    return found(**_checked(found, (), arguments, where=where))


def make(
    found: Any, arguments: Mapping[str, Any], *, takes: Sequence[str], where: str
) -> Callable[..., Any]:
    """A callable of the positional values `takes`, with `arguments` bound by name.

    Raises:
        ConfigError: it cannot be called so, an argument is unknown, missing or of a wrong type.
    """
    if inspect.isclass(found):
        made: Callable[..., Any] = construct(found, arguments, where=where)
        _checked(made, takes, {}, where=where)
        return made
    checked = _checked(found, takes, arguments, where=where)
    bound: Callable[..., Any] = partial(found, **checked) if checked else found
    return bound


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling it gives a coroutine."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004  # an object may be async only there
    )


def _checked(
    found: Any, takes: Sequence[str], arguments: Mapping[str, Any], *, where: str
) -> dict[str, Any]:
    """The arguments as the parameters' types read them: a list of a recipe may be a tuple."""
    name = getattr(found, "__qualname__", type(found).__qualname__)
    if not callable(found):
        raise ConfigError(f"{where}: {name} is no function and no class; found {found!r}")
    try:
        signature = inspect.signature(found)
        signature.bind(*takes, **arguments)
    except (TypeError, ValueError) as error:
        wanted = ", ".join([*takes, *(f"{key}=…" for key in arguments)])
        written = signature_text(found)
        raise ConfigError(
            f"{where}: {name}{written} cannot be called as {name}({wanted}): {error}"
        ) from error
    hints = _hints(found)
    return {
        key: _read(value, hints.get(key, Any), where=f"{where}.arguments.{key}")
        for key, value in arguments.items()
    }


def signature_text(found: Any) -> str:
    """The signature in words; empty where Python does not know it."""
    try:
        return str(inspect.signature(found))
    except (TypeError, ValueError):
        return ""


def _hints(found: Any) -> dict[str, Any]:
    """Types of the parameters; none where they cannot be resolved."""
    target = found.__init__ if inspect.isclass(found) else found
    try:
        return get_type_hints(target)
    except (NameError, TypeError, AttributeError):
        return {}


def _read(value: Any, hint: Any, *, where: str) -> Any:
    try:
        adapter = TypeAdapter(hint)
    except (PydanticSchemaGenerationError, PydanticUndefinedAnnotation):
        return value  # a type that no recipe can be checked against
    try:
        return adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        said = error.errors(include_url=False)[0]["msg"]
        raise ConfigError(f"{where}: found {value!r}: {said}") from error
