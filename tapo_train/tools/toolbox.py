"""The tools of a run behind one validated, limited, deadlined door.

A call is read once (`read`) and made on the tools' event loop (`execute`, `call.py`), whichever
loop the policy plays on.
"""

from __future__ import annotations

import asyncio
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError

from tapo_train.errors import ConfigError
from tapo_train.tools.base import Tool, ToolContext, ToolRequest
from tapo_train.tools.call import CallPolicy
from tapo_train.tools.environment import Environments
from tapo_train.tools.images import ImageDecoder, ResultPictures
from tapo_train.tools.ledger import Ledger
from tapo_train.tools.limits import ToolLimits
from tapo_train.tools.recording import Replay
from tapo_train.tools.schema import complaint, function_schema, typed_text
from tapo_train.tools.threads import TOOLS, DaemonThreads
from tapo_train.types import Observation, Outcome, Task

__all__ = ["CLOSE_S", "Toolbox", "close_tools"]

CLOSE_S = 20.0
"""[s] all tools together have to close; longer than a server of theirs is waited for."""
SETTLE_S = 5.0
"""[s] calls that were given up have to end; one that ignores that is left behind."""
EXACT_INTEGERS = 2.0**53
"""Beyond it a JSON number with a point need not be the integer it looks like."""
_NAME = re.compile(r"[A-Za-z0-9_.+-]{1,64}")
"""What a metric's name and a chat template can carry."""


class Toolbox:
    """The tools of a run.

    Args:
        deadline_s: [s] for the work of a call whose tool's limits name no other.
        queue_s: [s] a call may wait for its turn, where its tool's limits name no other.
        limits: by the name of the tool.
        ledger: where calls are recorded and paid.
        replay: what a recording does for the calls; None: there is none.
        environments: whose methods are tools, besides; None: there are none.
        pictures: what is taken of the pictures that tools answer with.

    Raises:
        ConfigError: names that are equal or no names, or limits for a tool that is not there.
    """

    def __init__(
        self,
        tools: Sequence[Tool],
        *,
        deadline_s: float,
        queue_s: float = 300.0,
        limits: Mapping[str, ToolLimits] | None = None,
        ledger: Ledger | None = None,
        replay: Replay | None = None,
        pictures: ResultPictures | None = None,
        environments: Environments | None = None,
    ) -> None:
        limits = limits or {}
        tools = [*tools, *(environments.tools if environments else ())]
        self.environments = environments
        _require_names([tool.name for tool in tools], limits)
        self.ledger = ledger or Ledger()
        self._replay = replay
        pictures = pictures or ResultPictures(decoder=ImageDecoder())
        self._policies: dict[str, CallPolicy] = {}
        for tool in tools:
            chosen = limits.get(tool.name, ToolLimits())
            self._policies[tool.name] = CallPolicy(
                tool=tool,
                limits=chosen,
                deadline_s=chosen.deadline_s or deadline_s,
                queue_s=chosen.queue_s or queue_s,
                ledger=self.ledger,
                pictures=pictures,
                replay=replay,
            )
        self._schemas = [
            function_schema(tool.name, tool.description, tool.arguments_model) for tool in tools
        ]
        self._under_way = dict.fromkeys(self._policies, 0)
        self._is_closed = False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tools, in recipe order."""
        return tuple(self._policies)

    @property
    def _tools(self) -> list[Tool]:
        return [policy.tool for policy in self._policies.values()]

    @property
    def versions(self) -> Mapping[str, str]:
        """What each tool says of its back end, by name."""
        return {name: policy.tool.version for name, policy in self._policies.items()}

    def schemas(self) -> list[dict[str, Any]]:
        """OpenAI function schemas, for the chat template."""
        return list(self._schemas)

    def read(self, name: str, arguments: Mapping[str, Any] | None) -> ToolRequest:
        """The tool and the checked arguments of a call, or what is wrong with it."""
        policy = self._policies.get(name)
        if policy is None:
            known = ", ".join(self._policies)
            return ToolRequest(name=name, error=f"there is no tool {name!r}; known tools: {known}")
        try:
            checked = policy.tool.arguments_model.model_validate(as_json_means(arguments or {}))
        except ValidationError as error:
            return ToolRequest(name=name, error=complaint(name, error))
        return ToolRequest(name=name, tool=policy.tool, arguments=checked)

    def typed(self, name: str, texts: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments that were written as texts, as JSON where the tool's schema wants no text.

        What is not JSON stays as it is, and is what the policy is told about.
        """
        policy = self._policies.get(name)
        if policy is None:
            return dict(texts)
        tool = policy.tool
        schema = function_schema(tool.name, tool.description, tool.arguments_model)
        known = schema["function"]["parameters"]["properties"]
        return {key: typed_text(text, known.get(key, {})) for key, text in texts.items()}

    async def execute(self, request: ToolRequest, context: ToolContext) -> Observation:
        """Run one call; every way it can end is an outcome of the observation.

        Raises:
            ReplayMissError: a strict replay does not know the call.
        """
        if request.arguments is None:
            return Observation(text=f"Error: {request.error}", outcome=Outcome.MODEL_ERROR)
        self._under_way[request.name] += 1
        try:
            answer = self._policies[request.name].answer(request.arguments, context)
            return await asyncio.wrap_future(TOOLS.submit(answer))
        finally:
            self._under_way[request.name] -= 1

    async def open(self, trajectory: str, task: Task) -> str:
        """A trajectory begins: what its environment says of the task, "" without one."""
        if self.environments is None:
            return ""
        return await asyncio.wrap_future(TOOLS.submit(self.environments.open(trajectory, task)))

    async def end(self, trajectories: Iterable[str]) -> None:
        """These are over and have their rewards: their environments are closed."""
        if self.environments is not None:
            await asyncio.wrap_future(TOOLS.submit(self.environments.end(trajectories)))

    def under_way(self) -> dict[str, int]:
        """Calls that have not been answered yet, by tool; any thread may ask."""
        return dict(self._under_way)

    @contextmanager
    def settled(self) -> Iterator[None]:
        """After the block, calls that were given up in it are over, and their cost is known."""
        try:
            yield
        finally:
            works = [TOOLS.submit(policy.settle(SETTLE_S)) for policy in self._policies.values()]
            wait(works, timeout=2 * SETTLE_S)

    def close(self) -> None:
        """End what the tools keep open: sessions, processes, files. The first call does it."""
        if self._is_closed:
            return
        self._is_closed = True
        close_tools([*self._tools, *([self.environments] if self.environments else [])])
        if self._replay is not None:
            self._replay.recording.close()


def close_tools(tools: Sequence[Any], *, within_s: float = CLOSE_S) -> None:
    """Call `close` of those that have one, side by side; a coroutine runs on the tools' loop.

    What goes wrong is said on standard error and not raised: a run that fails has an error of
    its own to end with, and one that is done has its results.
    """
    threads = DaemonThreads(max(1, len(tools)), max_abandoned=1)
    closing = {
        TOOLS.submit(tool.close())
        if inspect.iscoroutinefunction(tool.close)
        else threads.submit(tool.close): str(tool.name)
        for tool in tools
        if hasattr(tool, "close")
    }
    done, late = wait(closing, timeout=within_s)
    for call in late:
        _say(f"{closing[call]} has not closed within {within_s:g} s")
    for call in done:
        if (error := call.exception()) is not None:
            _say(f"{closing[call]} could not be closed: {type(error).__name__}: {error}")


def as_json_means(value: Any) -> Any:
    """The value with its integers as such: JSON knows one kind of number, and 3.0 is a 3."""
    if isinstance(value, float) and value.is_integer() and abs(value) < EXACT_INTEGERS:
        return int(value)
    if isinstance(value, Mapping):
        return {key: as_json_means(inner) for key, inner in value.items()}
    return [as_json_means(inner) for inner in value] if isinstance(value, list) else value


def _say(problem: str) -> None:
    print(f"tool {problem}", file=sys.stderr, flush=True)


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
