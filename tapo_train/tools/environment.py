"""Stateful environments: an instance of a class for each trajectory, its public methods as tools.

The contract is that of TRL's `environment_factory`: a class that is made without arguments (ours
may take the recipe's), `reset(**row)` before each trajectory, whose text is appended to the
question, and public methods with types and a documented `Args` section, which are the tools. The
reward is read from the instance's state when the trajectory is over. `close`, if there is one, is
called whatever happens. Calls of one instance come one after the other, and none is made twice.

A ValueError of a method is the policy's error, which it reads, and so are the errors of tools
(`errors.ToolError`); any other exception is a bug, and the trajectory leaves loss and baseline. TRL
shows the policy all of them. An instance that could not be reset ends its trajectory at the
first call in the same way.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import BaseModel

from tapo_train.errors import ConfigError, TapoError, ToolArgumentError, ToolDownError
from tapo_train.tools.base import EVERYTHING, STATE, ToolContext
from tapo_train.tools.function_tool import FunctionTool, tool
from tapo_train.types import Observation, Task, Trajectory

__all__ = ["Environments"]

NO_TOOLS = frozenset({"reset", "close"})
CLOSE_S = 10.0
"""[s] the instances of a group have to close."""


@dataclass(slots=True)
class _Held:
    """The instance of one trajectory; it may be closed before it is made."""

    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    guard: threading.Lock = field(default_factory=threading.Lock)
    instance: Any = None
    failure: str = "it was never reset"
    is_closed: bool = False

    def start(self, make: Callable[[], Any], row: dict[str, Any]) -> str:
        """Make and reset; what it says first. Closed meanwhile, it is closed again at once."""
        instance = make()
        with self.guard:
            self.instance = instance
        said = instance.reset(**row)
        with self.guard:
            self.failure = ""
            is_closed = self.is_closed
        if is_closed:
            _close(instance)
        return "" if said is None else str(said)

    def close(self) -> None:
        """Of an instance that is being reset, what closes is done twice."""
        with self.guard:
            self.is_closed, instance = True, self.instance
        if instance is not None:
            _close(instance)


class Environments:
    """Instances by trajectory.

    Args:
        make: gives a new instance.
        reset_s: [s] a reset may take.

    Raises:
        ConfigError: it has no `reset`, or no public method that is a tool.
    """

    name = "environment"

    def __init__(self, make: Callable[[], Any], *, reset_s: float = 30.0) -> None:
        self._make = make
        self._reset_s = reset_s
        self._held: dict[str, _Held] = {}
        shown = make()
        if not callable(getattr(shown, "reset", None)):
            raise ConfigError(f"tools.environment: {type(shown).__name__} has no reset(**row)")
        names = [n for n, _ in inspect.getmembers(type(shown), inspect.isfunction)]
        public = [n for n in names if not n.startswith("_") and n not in NO_TOOLS]
        self.tools = [_Method(self, tool(getattr(shown, name))) for name in public]
        """In the order of their names."""
        _close(shown)
        if not public:
            raise ConfigError(f"tools.environment: {type(shown).__name__} has no public method")

    async def open(self, id: str, task: Task) -> str:
        """Make and reset the instance of a trajectory; what it says about the task, or "".

        Never raises: an instance that fails does so at its first call.
        """
        held = self._held[id] = _Held()
        row = {**task.metadata, "id": task.id, "source": task.source}
        row |= {"prompt": task.question, "answers": list(task.answers)}
        starting = asyncio.ensure_future(asyncio.to_thread(held.start, self._make, row))
        await asyncio.wait((starting,), timeout=self._reset_s)
        if not starting.done():
            held.failure = f"its reset took more than {self._reset_s:g} s"
            return ""
        if (error := starting.exception()) is not None:
            held.failure = f"its reset failed: {type(error).__name__}: {error}"
            return ""
        return starting.result()

    async def call(self, method: FunctionTool, arguments: BaseModel, context: ToolContext) -> Any:
        """What the method of the trajectory's instance answers."""
        held = self._held.get(context.trajectory)
        if held is None or held.failure:
            why = "there is none for this trajectory" if held is None else held.failure
            raise ToolDownError(f"the environment: {why}", retryable=False)
        bound = replace(method, function=getattr(held.instance, method.function.__name__))
        async with held.turn:
            try:
                return await bound.run(arguments, context)
            except TapoError:
                raise
            except ValueError as error:
                raise ToolArgumentError(f"{method.name}: {error}") from error

    def state(self, trajectory: Trajectory, attribute: str) -> float:
        """A number of the trajectory's instance; raises what it raises, and if it is not there."""
        held = self._held[trajectory.id]
        if held.failure:
            raise ToolDownError(f"the environment: {held.failure}")
        return float(getattr(held.instance, attribute))

    async def end(self, ids: Iterable[str]) -> None:
        """Close the instances of these trajectories; what goes wrong is said and not raised."""
        held = [found for id in ids if (found := self._held.pop(id, None)) is not None]
        closing = [asyncio.ensure_future(asyncio.to_thread(one.close)) for one in held]
        if not closing:
            return
        _, late = await asyncio.wait(closing, timeout=CLOSE_S)
        if late:
            print(f"{len(late)} environments have not closed", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Close the instances that are left."""
        while self._held:
            self._held.popitem()[1].close()


@dataclass(frozen=True, slots=True)
class _Method:
    """A method as a `Tool`."""

    environments: Environments
    method: FunctionTool

    reads = EVERYTHING | {STATE}

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def description(self) -> str:
        return self.method.description

    @property
    def version(self) -> str:
        return self.method.version

    @property
    def arguments_model(self) -> type[BaseModel]:
        return self.method.arguments_model

    async def run(self, arguments: BaseModel, context: ToolContext) -> Observation:
        """See `Environments.call`."""
        answer: Observation = await self.environments.call(self.method, arguments, context)
        return answer


def _close(instance: Any) -> None:
    if callable(getattr(instance, "close", None)):
        instance.close()
