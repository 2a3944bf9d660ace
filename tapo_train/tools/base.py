"""What a tool is, what a call of it is, and what it says when it fails."""

from __future__ import annotations

import hashlib
import json
import uuid
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel

from tapo_train.errors import ToolArgumentError, ToolDownError, ToolError, ToolRefusedError
from tapo_train.types import Image, Observation, Outcome, Task

__all__ = [
    "EVERYTHING",
    "STATE",
    "THREADS",
    "CallName",
    "Tool",
    "ToolContext",
    "ToolRequest",
    "call_name",
    "failure",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolContext:
    """What a tool may see of the conversation."""

    images: tuple[Image, ...]
    """Registry of the conversation's pictures in order of appearance; img_idx indexes it."""
    task: Task
    trajectory: str = ""
    """Whose call it is, for tools with a state of their own for each."""


STATE = "state"
"""Read by a tool whose next answer to the same call may be another: none of its calls are equal."""
EVERYTHING = frozenset({"pictures", "task"})
"""What an answer may depend on beside the arguments, as a tool's attribute `reads` says it:
"picture" is the one that `img_idx` names, "pictures" all of the conversation, "task" the
question with its answers. Of a tool without that attribute everything is assumed."""

THREADS = 64
"""Of a tool that does not say it: blocking tools wait more than they compute."""


class Tool(Protocol):
    """A tool: validated arguments in, observation out.

    Its coroutines run on the tools' event loop, its blocking work (`asyncio.to_thread`) in threads
    of its own. It may say what it `reads` of the conversation (EVERYTHING): calls that agree in
    that are equal, so they share an answer while it is under way and in a recording. It may say
    how many threads its blocking work has at most (`max_threads`; else THREADS): one that computes
    with small arrays only slows itself down in many, as they wait for the interpreter. It may have
    a `close`, plain or a coroutine, for the end of the run.
    """

    @property
    def name(self) -> str:
        """As written in `<tool_call>`."""

    @property
    def description(self) -> str:
        """One sentence for the policy."""

    @property
    def version(self) -> str:
        """Changes whenever the same call may get another answer; part of a call's name."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class CallName:
    """Which call it is: two with equal names have the same answer."""

    tool: str
    version: str
    arguments: str
    """As checked, in canonical JSON."""
    key: str
    """sha256 in hex over all that the answer may depend on."""


def call_name(tool: Tool, arguments: BaseModel, context: ToolContext) -> CallName:
    """Tool, version, arguments, and of the conversation what the tool reads of it."""
    values = arguments.model_dump(mode="json")
    written = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    reads = getattr(tool, "reads", EVERYTHING)
    parts: dict[str, Any] = {"tool": tool.name, "version": tool.version, "arguments": written}
    if "picture" in reads:
        index = getattr(arguments, "img_idx", 0)
        count = len(context.images)
        # A wrong index is answered with how many there are.
        parts["picture"] = _named(context.images[index]) if 0 <= index < count else count
    if "pictures" in reads:
        parts["pictures"] = [_named(image) for image in context.images]
    if "task" in reads:
        task = context.task
        pictures = [_named(image) for image in task.images]
        parts["task"] = [task.id, task.question, list(task.answers), pictures]
    if STATE in reads:
        parts[STATE] = uuid.uuid4().hex
    content = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    key = hashlib.sha256(content.encode()).hexdigest()
    return CallName(tool=tool.name, version=tool.version, arguments=written, key=key)


def _named(image: Image) -> list[Any]:
    """A picture by content, and by where it was cut from, which a crop of it remembers."""
    return [image.sha256, image.ref.root, list(image.ref.box)]


def failure(tool: str, error: ToolError) -> Observation:
    """The observation that says how a call failed."""
    text, outcome = f"{tool} failed: {error}", Outcome.TOOL_ERROR
    if isinstance(error, ToolArgumentError):
        text, outcome = str(error), Outcome.MODEL_ERROR
    elif isinstance(error, ToolRefusedError):
        text, outcome = str(error), Outcome.REFUSED
    elif isinstance(error, ToolDownError):
        outcome = Outcome.INFRA_ERROR
    return Observation(text=f"Error: {text}", outcome=outcome)
