"""What a tool is, and the one boundary around every tool call.

A tool is an object with a name, a version, a pydantic model of its arguments and
a coroutine. The toolbox reads a call once, waits for a seat, runs the tool under its
deadline, tries again what may pass, and turns whatever happens into an `Observation`
with a typed outcome, so a failing tool never takes a trajectory down and never goes
unnoticed. What a call took and cost is kept in the ledger.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
from tapo_train.tools.closing import close_tools
from tapo_train.tools.ledger import CallRecord, Ledger
from tapo_train.tools.limits import Gate, ToolLimits
from tapo_train.tools.schema import complaint, function_schema
from tapo_train.tools.threads import use_daemon_threads
from tapo_train.types import Image, Observation, Outcome, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolContext:
    """What a tool may see of the conversation."""

    images: tuple[Image, ...]
    """Registry of the conversation's pictures in order of appearance; img_idx indexes it."""
    task: Task


EVERYTHING = frozenset({"pictures", "task"})
"""What an answer may depend on beside the arguments, as a tool's attribute `reads` says it:
"picture" is the one that `img_idx` names, "pictures" all of the conversation, "task" the
question with its answers. Of a tool without that attribute everything is assumed."""


class Tool(Protocol):
    """A tool: validated arguments in, observation out.

    It may say what it `reads` of the conversation (EVERYTHING), for record and replay. It may have
    a coroutine `recorded(arguments, context)`: the answer that it has already, which is free.
    """

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


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolRequest:
    """A call of the policy, read once: its tool and checked arguments, or what is wrong."""

    name: str
    tool: Tool | None = None
    arguments: BaseModel | None = None
    error: str | None = None
    """In words for the policy; None if the call can be run."""


class Toolbox:
    """The tools of a run behind one validated, limited, deadlined door.

    Args:
        deadline_s: [s] for a call of a tool whose limits name no other.
        limits: by the name of the tool.
        ledger: where calls are recorded and paid.

    Raises:
        ConfigError: names that are equal or no names, or limits for a tool that is not there.
    """

    def __init__(
        self,
        tools: Sequence[Tool],
        *,
        deadline_s: float,
        limits: Mapping[str, ToolLimits] | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self._tools = {tool.name: tool for tool in tools}
        _require_names([tool.name for tool in tools], limits or {})
        self._deadline_s = deadline_s
        self._gates = {name: Gate((limits or {}).get(name, ToolLimits())) for name in self._tools}
        self.ledger = ledger or Ledger()
        self._under_way = dict.fromkeys(self._tools, 0)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tools, in recipe order."""
        return tuple(self._tools)

    def schemas(self) -> list[dict[str, Any]]:
        """OpenAI function schemas, for the chat template."""
        return [
            function_schema(tool.name, tool.description, tool.arguments_model)
            for tool in self._tools.values()
        ]

    def read(self, name: str, arguments: Mapping[str, Any] | None) -> ToolRequest:
        """The tool and the checked arguments of a call, or what is wrong with it."""
        tool = self._tools.get(name)
        if tool is None:
            known = ", ".join(self._tools)
            return ToolRequest(name=name, error=f"there is no tool {name!r}; known tools: {known}")
        try:
            checked = tool.arguments_model.model_validate(dict(arguments or {}))
        except ValidationError as error:
            return ToolRequest(name=name, error=complaint(name, error))
        return ToolRequest(name=name, tool=tool, arguments=checked)

    async def execute(self, request: ToolRequest, context: ToolContext) -> Observation:
        """Run one call; every way it can end is an outcome of the observation."""
        if request.tool is None:
            return _failure(Outcome.MODEL_ERROR, request.error or "")
        self._under_way[request.name] += 1
        try:
            return await self._execute(request, request.tool, context)
        finally:
            self._under_way[request.name] -= 1

    def under_way(self) -> dict[str, int]:
        """Calls that have not been answered yet, by tool; any thread may ask."""
        return dict(self._under_way)

    async def _execute(self, request: ToolRequest, tool: Tool, context: ToolContext) -> Observation:
        self._bind()
        gate, asked = self._gates[request.name], time.perf_counter()
        async with gate.seat():
            run = _Run(tool=tool, price=gate.limits.price, ledger=self.ledger)
            started = time.perf_counter()
            observation = await self._outcome(run, request.arguments, context, gate)
            ended = time.perf_counter()
        self.ledger.add(
            CallRecord(
                tool=request.name,
                outcome=observation.outcome,
                latency_s=ended - started,
                queue_s=started - asked,
                attempts=run.attempts,
                cached=observation.cached,
                cost=run.cost,
            )
        )
        return replace(observation, latency_s=ended - started)

    def close(self) -> None:
        """End what the tools keep open: sessions, processes, files. The first call does it."""
        if not self._is_closed:
            self._is_closed = True
            close_tools(list(self._tools.values()))

    async def _outcome(
        self, run: _Run, arguments: BaseModel | None, context: ToolContext, gate: Gate
    ) -> Observation:
        name, deadline_s = run.tool.name, gate.limits.deadline_s or self._deadline_s
        try:
            attempt = partial(run.attempt, arguments, context)
            return await _within_deadline(gate.attempts(attempt), deadline_s)
        except TimeoutError as error:
            return _failure(Outcome.TIMEOUT, f"{name} gave no answer in time: {error}")
        except ToolError as error:
            return failure(name, error)
        except ReplayMissError:
            raise  # the run has left its recording: no single call's failure
        except Exception as error:  # noqa: BLE001  # the tool boundary: recorded, not fatal
            return _failure(Outcome.INFRA_ERROR, f"{name} failed: {type(error).__name__}: {error}")

    def _bind(self) -> None:
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop = loop
            use_daemon_threads()


@dataclass(slots=True, kw_only=True)
class _Run:
    """The attempts of one call, as they are made."""

    tool: Tool
    price: float
    ledger: Ledger
    attempts: int = 0
    cost: float = 0.0

    async def attempt(self, arguments: BaseModel | None, context: ToolContext) -> Observation:
        self.attempts += 1
        recorded = getattr(self.tool, "recorded", None)
        if recorded is not None:
            known: Observation | None = await recorded(arguments, context)
            if known is not None:
                return known
        self.ledger.charge(self.price)
        self.cost += self.price
        observation = await self.tool.run(arguments, context)
        if not isinstance(observation, Observation):
            raise TypeError(f"found {type(observation).__name__}, wanted an Observation")
        if observation.cached:
            self.ledger.give_back(self.price)
            self.cost -= self.price
        return observation


async def _within_deadline(
    call: Coroutine[Any, Any, Observation], deadline_s: float
) -> Observation:
    """The call's answer; TimeoutError if it is not there in time.

    An engine that shares this thread may hold the loop for longer than the deadline.
    A call that finished meanwhile is not late: its answer is in the loop's queue
    behind the timer, so the loop gets a few rounds before the call is given up.
    """
    task = asyncio.ensure_future(call)
    try:
        await asyncio.wait((task,), timeout=deadline_s)
        for _ in range(_ROUNDS_OF_GRACE):
            if not task.done():
                await asyncio.sleep(0)
    finally:
        if not task.done():
            task.cancel()
    if not task.done():
        raise TimeoutError(f"its deadline is {deadline_s:g} s")
    return task.result()


_ROUNDS_OF_GRACE = 4
_NAME = re.compile(r"[A-Za-z0-9_.+-]{1,64}")
"""What a metric's name and a chat template can carry."""


def _require_names(names: Sequence[str], limits: Mapping[str, ToolLimits]) -> None:
    if len(set(names)) != len(names):
        raise ConfigError(f"tools: names must differ, found {list(names)}")
    if bad := [name for name in names if not _NAME.fullmatch(name)]:
        raise ConfigError(
            f"tools: found the name {bad[0]!r}, wanted 1 to 64 letters, digits, _ . + or -"
        )
    if unknown := sorted(set(limits) - set(names)):
        raise ConfigError(
            f"tools.limits.{unknown[0]}: there is no such tool; known: {', '.join(names)}"
        )


def failure(tool: str, error: ToolError) -> Observation:
    """The observation that says how a call failed."""
    if isinstance(error, ToolArgumentError):
        return _failure(Outcome.MODEL_ERROR, str(error))
    if isinstance(error, ToolRefusedError):
        return _failure(Outcome.REFUSED, str(error))
    is_down = isinstance(error, ToolDownError)
    outcome = Outcome.INFRA_ERROR if is_down else Outcome.TOOL_ERROR
    return _failure(outcome, f"{tool} failed: {error}")


def _failure(outcome: Outcome, message: str) -> Observation:
    return Observation(text=f"Error: {message}", outcome=outcome)
