"""Record what tools answer, and play it back: a run whose world does not change under it.

`ReplayTool` wraps a tool. What a call is, its key says: the tool's name and version, the
arguments as checked, in canonical JSON, and of the conversation what the tool reads of it.
Kept is what a policy may read: answers, and what the tool or a guard said no to. A back end
that was down or too slow is no answer: that call is asked again another time.

    record            ask the tool each time; the first answer to a call is everybody's
    replay            answer from the recording; a call that is not there ends the run
    replay_or_record  answer from the recording, ask and record what is not there
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from contextlib import closing
from typing import Any, Literal

from pydantic import BaseModel

from tapo_train.errors import (
    ReplayMissError,
    ToolDownError,
    ToolError,
)
from tapo_train.tools.base import EVERYTHING, Tool, ToolContext, failure
from tapo_train.tools.recording import Recording
from tapo_train.types import Image, Observation

__all__ = ["Mode", "ReplayTool", "call_key"]

Mode = Literal["record", "replay", "replay_or_record"]


class ReplayTool:
    """A tool whose answers are recorded or played back."""

    def __init__(self, tool: Tool, recording: Recording, mode: Mode) -> None:
        self.name = tool.name
        self.description = tool.description
        self.version = tool.version
        self.arguments_model: type[BaseModel] = tool.arguments_model
        self._tool = tool
        self._recording = recording
        self._mode = mode

    async def recorded(self, arguments: BaseModel, context: ToolContext) -> Observation | None:
        """The recorded answer; None if the tool is to be asked.

        Raises:
            ReplayMissError: in a strict replay, the call was not recorded.
        """
        if self._mode == "record":
            return None
        written, key = self._named(arguments, context)
        known = await asyncio.to_thread(self._recording.get, key)
        if known is None and self._mode == "replay":
            raise ReplayMissError(
                f"tools.replay=replay: {self.name} {written[:500]} (version {self.version}) is not "
                f"among the {len(self._recording)} calls of {self._recording.folder}; wanted a run "
                "that takes the recorded one's course. replay_or_record asks the tool instead"
            )
        return known

    async def run(self, arguments: BaseModel, context: ToolContext) -> Observation:
        """The recorded answer, or the tool's, which is recorded.

        Raises:
            ReplayMissError: in a strict replay, the call was not recorded.
            ToolDownError: the back end is out of order; also whatever else the tool raises
                that is no answer.
        """
        known = await self.recorded(arguments, context)
        if known is not None:
            return known
        answer = await self._answer(arguments, context)
        written, key = self._named(arguments, context)
        return await asyncio.to_thread(
            self._recording.put,
            key,
            tool=self.name,
            version=self.version,
            arguments=written,
            observation=answer,
        )

    def close(self) -> None:
        """Close the tool, and the recording."""
        with closing(self._recording):
            if hasattr(self._tool, "close"):
                self._tool.close()

    def _named(self, arguments: BaseModel, context: ToolContext) -> tuple[str, str]:
        """The arguments as they are recorded, and the key of the call."""
        written = canonical(arguments)
        return written, call_key(self._tool, written, arguments, context)

    async def _answer(self, arguments: BaseModel, context: ToolContext) -> Observation:
        """What the policy reads, a "no" included; raises what is no answer."""
        try:
            return await self._tool.run(arguments, context)
        except ToolDownError:
            raise
        except ToolError as error:
            return failure(self.name, error)


def canonical(arguments: BaseModel) -> str:
    """Checked arguments as JSON that is the same for equal arguments."""
    values = arguments.model_dump(mode="json")
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def call_key(tool: Tool, written: str, arguments: BaseModel, context: ToolContext) -> str:
    """sha256 in hex over everything the answer may depend on."""
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
    content = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()


def _named(image: Image) -> list[Any]:
    """A picture by content, and by where it was cut from, which a crop of it remembers."""
    return [image.sha256, image.ref.root, list(image.ref.box)]
