"""Tools by import path, as a recipe names them. Naming a tool is running its module's code."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from tapo_train.errors import ConfigError
from tapo_train.import_path import construct, load
from tapo_train.tools.base import Tool

__all__ = ["load_tool"]


def load_tool(
    path: str, arguments: Mapping[str, Any] | None = None, *, where: str = "tools.extra"
) -> Tool:
    """The tool at `package.module:name`: a tool, or what makes one when called with `arguments`.

    Raises:
        ConfigError: there is no such module or name, it is no tool, or the arguments do not fit.
    """
    found, arguments = load(path, where=where), arguments or {}
    # A class has the attributes of its instances, so it must not be taken for one of them.
    if inspect.isclass(found) or inspect.isroutine(found):
        found = construct(found, arguments, where=where)
    elif arguments:
        raise ConfigError(
            f"{where}: {path} is made already, so it takes no arguments; found {sorted(arguments)}"
        )
    missing = _missing(found)
    if missing is not None:
        raise ConfigError(
            f"{where}: {path} is no tool: found {type(found).__name__}, {missing}; wanted "
            "name, version, description, arguments_model and async run, or a function under @tool"
        )
    tool: Tool = found
    return tool


def _missing(found: Any) -> str | None:
    """What `found` lacks of a tool, in words; None if it is one."""
    for field in ("name", "version", "description"):
        if not isinstance(getattr(found, field, None), str):
            return f"its {field} is not a string"
    model = getattr(found, "arguments_model", None)
    if not (inspect.isclass(model) and issubclass(model, BaseModel)):
        return "its arguments_model is no pydantic model"
    if not inspect.iscoroutinefunction(getattr(found, "run", None)):
        return "its run is not an async method"
    return None
