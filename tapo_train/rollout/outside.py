"""A model that somebody serves, played with the same tools; for evaluation.

It is asked for messages and not for tokens: its trajectories have none, only as many as it says it
wrote, and cannot be trained on. Calls are taken from the answer's `tool_calls`, or as `<tool_call>`
from its text; the rules of an episode are those of `agent.py`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tapo_train.rollout.agent import OUTSIDE_POLICY
from tapo_train.rollout.limits import Limits
from tapo_train.rollout.outside_model import MODEL, Function, Message
from tapo_train.rollout.parse import parse_turn
from tapo_train.tools.base import ToolContext, ToolRequest
from tapo_train.tools.toolbox import Toolbox
from tapo_train.types import (
    Image,
    Observation,
    Outcome,
    Span,
    StopReason,
    Task,
    ToolCall,
    Trajectory,
    Turn,
)

__all__ = ["OutsideEpisode"]

_SEEN = "The pictures that the tools answered with, in order:"


@dataclass(slots=True, kw_only=True)
class OutsideEpisode:
    """One attempt of an outside model at a task."""

    id: str
    task: Task
    attempt: int
    model: Toolbox
    """Holds an `OutsideModel` alone."""
    toolbox: Toolbox
    limits: Limits
    system_prompt: str
    _messages: list[dict[str, Any]] = field(default_factory=list)
    _images: tuple[Image, ...] = ()
    _turns: list[Turn] = field(default_factory=list)
    _tokens: int = 0

    async def play(self) -> Trajectory:
        """Until it answers, or a limit or a failure ends it."""
        self._images = self.task.images
        pictures = [{"picture": place} for place in range(len(self._images))]
        question = [*pictures, {"type": "text", "text": self.task.question}]
        self._messages = [
            {"role": "system", "content": self.system_prompt},
            {"role": "user", "content": question},
        ]
        stop = None
        while stop is None:
            stop = await self._turn()
        last = parse_turn(self._turns[-1].text)
        is_over = stop is StopReason.ANSWER
        return Trajectory(
            id=self.id,
            task=self.task,
            tokens=np.zeros(0, dtype=np.int32),
            logprobs=np.zeros(0, dtype=np.float32),
            turns=tuple(self._turns),
            images=self._images,
            answer=last.answer if is_over else None,
            stop=stop,
        )

    async def _turn(self) -> StopReason | None:
        asked = {"messages": self._messages, "attempt": self.attempt}
        seen = await self.model.execute(self.model.read(MODEL, asked), self._context())
        if seen.outcome is not Outcome.OK:
            failed = ToolCall(
                name=MODEL, arguments={}, valid=True, executed=True, observation=_broken(seen)
            )
            self._record("", (failed,), 0)
            return StopReason.INFRA
        said = json.loads(seen.text)
        message = Message.model_validate(said["message"])
        text, requests = self._read(message)
        is_last = len(self._turns) + 1 >= self.limits.max_turns
        allowed = 0 if is_last else self.limits.max_parallel_calls
        context = self._context()
        answers = await asyncio.gather(
            *(self.toolbox.execute(request, context) for request, _ in requests[:allowed])
        )
        calls = tuple(
            _call(request, given, answers[place] if place < len(answers) else None)
            for place, (request, given) in enumerate(requests)
        )
        self._record(text, calls, said["tokens"])
        if not calls:
            return StopReason.ANSWER
        if any(answer.outcome in OUTSIDE_POLICY for answer in answers):
            return StopReason.INFRA
        if is_last:
            return StopReason.MAX_TURNS
        self._observe(message, text, answers)
        return None

    def _context(self) -> ToolContext:
        return ToolContext(images=self._images, task=self.task)

    def _read(self, message: Message) -> tuple[str, list[tuple[ToolRequest, Any]]]:
        """The text, and the calls with their arguments as they were given."""
        text = message.content or ""
        if message.tool_calls:
            return text, [self._native(call.function) for call in message.tool_calls]
        written = parse_turn(text).calls
        return text, [
            (
                ToolRequest(name=call.name, error=call.error)
                if call.error is not None
                else self.toolbox.read(call.name, call.arguments),
                call.arguments,
            )
            for call in written
        ]

    def _native(self, function: Function) -> tuple[ToolRequest, Any]:
        try:
            arguments = json.loads(function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            return ToolRequest(name=function.name, error="the arguments are no JSON object"), None
        return self.toolbox.read(function.name, arguments), arguments

    def _record(self, text: str, calls: tuple[ToolCall, ...], tokens: int) -> None:
        span = Span(start=self._tokens, end=self._tokens + tokens)
        self._tokens += tokens
        self._turns.append(
            Turn(
                index=len(self._turns),
                span=span,
                text=text,
                calls=calls,
                num_images_before=len(self._images),
            )
        )

    def _observe(self, message: Message, text: str, answers: Sequence[Observation]) -> None:
        """Append what was said and what the tools answered."""
        native = message.tool_calls or []
        own: dict[str, Any] = {"role": "assistant", "content": text}
        if native:
            answered = native[: len(answers)]
            own["tool_calls"] = [
                {"id": call.id, "type": "function", "function": call.function.model_dump()}
                for call in answered
            ]
            self._messages.append(own)
            self._messages += [
                {"role": "tool", "tool_call_id": call.id, "content": answer.text}
                for call, answer in zip(answered, answers, strict=True)
            ]
            texts: list[dict[str, Any]] = [{"type": "text", "text": _SEEN}]
        else:
            self._messages.append(own)
            wrapped = (f"<tool_response>\n{one.text}\n</tool_response>" for one in answers)
            texts = [{"type": "text", "text": "\n".join(wrapped)}]
        new = tuple(image for answer in answers for image in answer.images)
        places = range(len(self._images), len(self._images) + len(new))
        self._images += new
        if new or not native:
            pictures = [{"picture": place} for place in places]
            self._messages.append({"role": "user", "content": [*texts, *pictures]})


def _broken(seen: Observation) -> Observation:
    """Whatever way the endpoint failed, it is no fault of the policy's."""
    return Observation(text=seen.text, outcome=Outcome.INFRA_ERROR, latency_s=seen.latency_s)


def _call(request: ToolRequest, arguments: Any, answer: Observation | None) -> ToolCall:
    is_wrong = answer is not None and answer.outcome is Outcome.MODEL_ERROR
    return ToolCall(
        name=request.name,
        arguments=arguments,
        valid=request.error is None and not is_wrong,
        executed=answer is not None and request.error is None,
        observation=answer,
    )
