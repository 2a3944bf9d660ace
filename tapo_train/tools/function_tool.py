'''A tool from a plain typed function.

    @tool
    async def weather(city: str, days: int = 1) -> str:
        """Say what the weather will be.

        Args:
            city: name of the city
            days: how many days ahead, 1 to 7
        """

The first line is what the policy reads about the tool, the Args section about its arguments;
the types become the schema. A parameter of type `ToolContext` gets the conversation and is not
shown. Arguments are JSON: "3" is no integer, and a name the function does not have is an error.
'''

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Self, cast, get_type_hints, overload

from pydantic import BaseModel, ConfigDict, Field, create_model

from tapo_train.errors import ConfigError
from tapo_train.tools.base import EVERYTHING, ToolContext
from tapo_train.types import Observation

__all__ = ["FunctionTool", "tool"]

Answer = str | Observation
Function = Callable[..., Answer] | Callable[..., Awaitable[Answer]]

_CALLABLE_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class _Arguments(BaseModel):
    """Checked as the JSON they were: a list may become a tuple, but "3" no integer."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def model_validate(cls, obj: Any, **kwargs: Any) -> Self:
        return cls.model_validate_json(json.dumps(obj), **kwargs)


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionTool:
    """A `Tool` around a function; `tool` makes it. A blocking function runs in a thread."""

    function: Function
    name: str
    description: str
    version: str
    arguments_model: type[BaseModel]
    context_parameter: str | None

    @property
    def reads(self) -> frozenset[str]:
        """Of the conversation: all of it, or nothing if the function does not ask for it."""
        return EVERYTHING if self.context_parameter is not None else frozenset()

    async def run(self, arguments: BaseModel, context: ToolContext) -> Observation:
        """What the function answers; text becomes an observation."""
        # Not `model_dump`: a nested model stays the object the function's types promise.
        values = {name: getattr(arguments, name) for name in type(arguments).model_fields}
        if self.context_parameter is not None:
            values[self.context_parameter] = context
        if inspect.iscoroutinefunction(self.function):
            answer = await self.function(**values)
        else:
            blocking = cast(Callable[..., Answer], self.function)
            answer = await asyncio.to_thread(blocking, **values)
        return Observation(text=answer) if isinstance(answer, str) else answer


@overload
def tool(function: Function, /) -> FunctionTool: ...


@overload
def tool(
    *, name: str | None = None, version: str | None = None
) -> Callable[[Function], FunctionTool]: ...


def tool(
    function: Function | None = None, /, *, name: str | None = None, version: str | None = None
) -> FunctionTool | Callable[[Function], FunctionTool]:
    """Make a function a tool; with or without brackets.

    Args:
        function: takes typed arguments, returns `str` or `Observation`; async or blocking.
        name: as the policy writes it; the function's if None.
        version: changes when the same call may get another answer; a digest of the
            function's source if None, which does not see what the function calls.

    Raises:
        ConfigError: a parameter or the result has no type the policy's JSON can fill, an
            argument or the tool is not described, or the source cannot be read.
    """
    if function is None:
        return lambda function: _function_tool(function, name, version)
    return _function_tool(function, name, version)


def _function_tool(function: Function, name: str | None, version: str | None) -> FunctionTool:
    name = name or function.__name__
    hints = get_type_hints(function, include_extras=True)
    description, about = _documentation(function, name)
    returned = hints.get("return")
    if returned not in (str, Observation, Answer):
        raise ConfigError(f"tool {name}: returns {returned}; wanted str or Observation, annotated")
    context, fields = None, {}
    for parameter in inspect.signature(function).parameters.values():
        if hints.get(parameter.name) is ToolContext:
            context = parameter.name
            continue
        fields[parameter.name] = _field(parameter, hints, about, name)
    if strangers := sorted(set(about) - set(fields)):
        raise ConfigError(f"tool {name}: its docstring describes {strangers[0]}, not an argument")
    model: type[BaseModel] = create_model(name, __base__=_Arguments, **fields)
    return FunctionTool(
        function=function,
        name=name,
        description=description,
        version=version or _source_digest(function, name),
        arguments_model=model,
        context_parameter=context,
    )


def _field(
    parameter: inspect.Parameter, hints: dict[str, Any], about: dict[str, str], tool: str
) -> Any:
    """The (type, default) of an argument, as `create_model` takes it."""
    name = parameter.name
    if parameter.kind not in _CALLABLE_BY_NAME:
        raise ConfigError(
            f"tool {tool}: argument {name} cannot be given by name; wanted a plain one"
        )
    if name not in hints:
        raise ConfigError(f"tool {tool}: argument {name} has no type; wanted an annotation")
    if name not in about:
        raise ConfigError(f"tool {tool}: argument {name} is not described; wanted an Args section")
    required = parameter.default is inspect.Parameter.empty
    default = ... if required else parameter.default
    return (hints[name], Field(default, description=about[name]))


def _documentation(function: Function, name: str) -> tuple[str, dict[str, str]]:
    """The first line of the docstring, and what its Args section says of each argument."""
    text = inspect.getdoc(function) or ""
    first, _, rest = text.partition("\n")
    if not first.strip():
        raise ConfigError(f"tool {name}: has no docstring; wanted a line for the policy")
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", rest, flags=re.MULTILINE)
    about: dict[str, str] = {}
    last = ""
    for line in section[1].splitlines() if section else ():
        entry = re.fullmatch(r"(?: {4}|\t)(\w+)(?: \([^)]*\))?: *(.*)", line)
        if entry:
            last = entry[1]
            about[last] = entry[2].strip()
        elif line.strip() and last:
            about[last] = f"{about[last]} {line.strip()}"
    return first.strip(), about


def _source_digest(function: Function, name: str) -> str:
    try:
        source = inspect.getsource(function)
    except OSError as error:
        raise ConfigError(
            f"tool {name}: its source cannot be read; wanted @tool(version=...)"
        ) from error
    return hashlib.sha256(source.encode()).hexdigest()[:16]
