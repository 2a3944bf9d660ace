"""What a tool is, and the one boundary around every tool call.

A tool is an object with a name, a version, a pydantic model of its arguments and
a coroutine. The toolbox validates, runs it under a deadline and turns whatever
happens into an `Observation` with a typed outcome, so a failing tool never takes
a trajectory down and never goes unnoticed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pydantic import BaseModel, ValidationError

from tapo_train.errors import (
    ConfigError,
    ReplayMissError,
    ToolArgumentError,
    ToolDownError,
    ToolError,
    ToolRefusedError,
)
from tapo_train.types import Image, Observation, Outcome, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolContext:
    """What a tool may see of the conversation."""

    images: tuple[Image, ...]
    """Registry of the conversation's pictures in order of appearance; img_idx indexes it."""
    task: Task


class Tool(Protocol):
    """A tool: validated arguments in, observation out."""

    @property
    def name(self) -> str:
        """As written in `<tool_call>`."""

    @property
    def description(self) -> str:
        """One sentence for the policy."""

    @property
    def version(self) -> str:
        """Changes whenever the same call may get another answer; part of the replay key."""

    @property
    def arguments_model(self) -> type[BaseModel]:
        """Types, ranges and descriptions of the arguments."""

    async def run(self, arguments: Any, context: ToolContext) -> Observation:
        """Do it. `arguments` is an instance of `arguments_model`.

        Raises:
            ToolArgumentError: arguments that only the context shows to be wrong.
            ToolRefusedError: a guard said no.
            ToolDownError: its back end is out of order.
            ToolError: the tool answered that it cannot do this.
        """


class Toolbox:
    """The tools of a run behind one validated, deadlined door."""

    def __init__(self, tools: Sequence[Tool], *, deadline_s: float) -> None:
        self._tools = {tool.name: tool for tool in tools}
        if len(self._tools) != len(tools):
            raise ConfigError(f"tools: names must differ, found {[tool.name for tool in tools]}")
        self._deadline_s = deadline_s

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tools, in recipe order."""
        return tuple(self._tools)

    def schemas(self) -> list[dict[str, Any]]:
        """OpenAI function schemas, for the chat template."""
        return [function_schema(tool) for tool in self._tools.values()]

    def check(
        self, name: str, arguments: Mapping[str, Any] | None, context: ToolContext
    ) -> str | None:
        """None if the call is valid, else what is wrong with it, in words for the policy."""
        try:
            self._validated(name, arguments)
        except ToolArgumentError as error:
            return str(error)
        return None

    async def execute(
        self, name: str, arguments: Mapping[str, Any] | None, context: ToolContext
    ) -> Observation:
        """Run one call; every way it can end is an outcome of the observation."""
        started = time.perf_counter()
        observation = await self._outcome(name, arguments, context)
        return replace(observation, latency_s=time.perf_counter() - started)

    async def _outcome(
        self, name: str, arguments: Mapping[str, Any] | None, context: ToolContext
    ) -> Observation:
        try:
            tool, validated = self._validated(name, arguments)
            return await self._within_deadline(tool.run(validated, context))
        except ToolArgumentError as error:
            return _failure(Outcome.MODEL_ERROR, str(error))
        except ToolRefusedError as error:
            return _failure(Outcome.REFUSED, str(error))
        except TimeoutError:
            return _failure(Outcome.TIMEOUT, f"{name} gave no answer within {self._deadline_s} s")
        except ToolDownError as error:
            return _failure(Outcome.INFRA_ERROR, f"{name} failed: {error}")
        except ToolError as error:
            return _failure(Outcome.TOOL_ERROR, f"{name} failed: {error}")
        except ReplayMissError:
            raise  # the run has left its recording: no single call's failure
        except Exception as error:  # noqa: BLE001  # the tool boundary: recorded, not fatal
            return _failure(Outcome.INFRA_ERROR, f"{name} failed: {type(error).__name__}: {error}")

    async def _within_deadline(self, call: Coroutine[Any, Any, Observation]) -> Observation:
        """The call's answer; TimeoutError if it is not there in time.

        An engine that shares this thread may hold the loop for longer than the deadline.
        A call that finished meanwhile is not late: its answer is in the loop's queue
        behind the timer, so the loop gets a few rounds before the call is given up.
        """
        task = asyncio.ensure_future(call)
        try:
            await asyncio.wait((task,), timeout=self._deadline_s)
            for _ in range(_ROUNDS_OF_GRACE):
                if not task.done():
                    await asyncio.sleep(0)
        finally:
            if not task.done():
                task.cancel()
        if not task.done():
            raise TimeoutError
        return task.result()

    def _validated(self, name: str, arguments: Mapping[str, Any] | None) -> tuple[Tool, BaseModel]:
        tool = self._tools.get(name)
        if tool is None:
            known = ", ".join(self._tools)
            raise ToolArgumentError(f"there is no tool {name!r}; known tools: {known}")
        try:
            return tool, tool.arguments_model.model_validate(dict(arguments or {}))
        except ValidationError as error:
            raise ToolArgumentError(_explain(name, error)) from error


def function_schema(tool: Tool) -> dict[str, Any]:
    """The OpenAI function schema of a tool, without pydantic's generated titles."""
    schema = tool.arguments_model.model_json_schema()
    properties = {
        key: {field: value for field, value in spec.items() if field in _SCHEMA_FIELDS}
        for key, spec in schema.get("properties", {}).items()
    }
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if schema.get("required"):
        parameters["required"] = schema["required"]
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


_ROUNDS_OF_GRACE = 4
_SCHEMA_FIELDS = ("type", "description", "items", "default", "enum")


def _explain(name: str, error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{name}: argument {where} is missing"
    return f"{name}: {where + ': ' if where else ''}{message}, found {first['input']!r:.80}"


def _failure(outcome: Outcome, message: str) -> Observation:
    return Observation(text=f"Error: {message}", outcome=outcome)
