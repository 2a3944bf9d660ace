"""Attempts as demonstrations: written as messages, read back as rows to be imitated.

    {"task": id, "tools": [schemas], "messages": [
       {"role": "system", "content": text}, {"role": "user", "content": text, "images": [path]},
       {"role": "assistant", "content": text},
       {"role": "tool", "content": text, "images": [path]}, …]}

Paths are relative to the file. A message's pictures follow its text (before it, in the user's), so
nothing in a text stands for a picture. Tokens are made by the chat format of the model that
imitates: what one model has played, another can learn from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tapo_train.data.images import ImageLimits, read_image, resolve_inside
from tapo_train.data.row_files import rows_of
from tapo_train.data.rows import Row
from tapo_train.learner.batch import TrainingRow
from tapo_train.rewards.matching import normalise
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.template import Schema
from tapo_train.types import Image, JsonObject, Observation, Span, Task, Trajectory

__all__ = ["course_of", "demonstration_of", "read_demonstrations"]


def course_of(trajectory: Trajectory) -> tuple[str, ...]:
    """What two attempts at a question have in common that went the same way: calls and answer."""
    calls = (
        json.dumps([call.name, call.arguments], sort_keys=True, default=repr)
        for turn in trajectory.turns
        for call in turn.calls
    )
    return (*calls, normalise(trajectory.answer or ""))


def demonstration_of(
    trajectory: Trajectory,
    *,
    system_prompt: str,
    schemas: Sequence[Schema],
    keep: Callable[[Image], str],
) -> JsonObject:
    """The line of an attempt.

    Args:
        keep: stores a picture and says its path, relative to the file.
    """
    task = trajectory.task
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": system_prompt},
        {"role": "user", "content": task.question, "images": [keep(one) for one in task.images]},
    ]
    for turn in trajectory.turns:
        messages.append({"role": "assistant", "content": turn.text})
        for call in turn.calls:
            if call.observation is not None:
                pictures = [keep(one) for one in call.observation.images]
                said = {"content": call.observation.text, "images": pictures}
                messages.append({"role": "tool", **said})
    return {"task": task.id, "source": task.source, "tools": list(schemas), "messages": messages}


def read_demonstrations(path: Path, chat: ChatFormat) -> Iterator[TrainingRow]:
    """The rows of a file: assistant turns are imitated, everything else is read.

    Raises:
        DataError: a line is no demonstration, or a picture is missing or damaged.
    """
    for _, _, read in rows_of(path):
        yield _training_row(read(), path.parent, chat)


def _training_row(row: Row, folder: Path, chat: ChatFormat) -> TrainingRow:
    system, user, *rest = _messages(row)
    images = _images(user, folder)
    task = Task(id=row.identifier("task"), question=user.text("content"), images=images, answers=())
    schemas = row.fields.get("tools")
    if not isinstance(schemas, list):
        raise row.wrong("tools", "a list of schemas")
    prompt = str(system.fields.get("content") or "")
    parts = [chat.prompt(task, system_prompt=prompt, tool_schemas=schemas)]
    spans: list[Span] = []
    answers: list[Observation] = []
    for message in rest:
        if message.fields["role"] == "tool":
            seen = _images(message, folder)
            answers.append(Observation(text=str(message.fields.get("content")), images=seen))
            images += seen
            continue
        if answers:
            parts.append(chat.observation(answers))
            answers = []
        start = sum(map(len, parts))
        parts.append(chat.assistant(message.text("content")))
        spans.append(Span(start=start, end=start + len(parts[-1])))
    return TrainingRow.supervised(
        id=task.id, tokens=np.concatenate(parts), images=images, spans=tuple(spans)
    )


def _messages(row: Row) -> list[Row]:
    """System, user, then assistant and tool, an assistant turn at both ends."""
    held = row.fields.get("messages")
    if not isinstance(held, list) or not all(isinstance(message, dict) for message in held):
        raise row.wrong("messages", "a list of messages")
    messages = [Row(f"{row.where}: messages[{n}]", message) for n, message in enumerate(held)]
    roles = [message.fields.get("role") for message in messages]
    is_ordered = (
        roles[:3] == ["system", "user", "assistant"]
        and roles[-1] == "assistant"
        and set(roles[3:]) <= {"assistant", "tool"}
        and ("assistant", "assistant") not in pairwise(roles)
    )
    if not is_ordered:
        raise row.wrong("messages", "system, user, then assistant and tool in turn")
    return messages


def _images(message: Row, folder: Path) -> tuple[Image, ...]:
    names = message.fields.get("images") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise message.wrong("images", "a list of paths")
    return tuple(_image(message.where, folder, name) for name in names)


def _image(where: str, folder: Path, name: str) -> Image:
    path = resolve_inside([folder], name, where=where)
    limits = ImageLimits()
    try:
        with path.open("rb") as stream:
            data = stream.read(limits.max_bytes + 1)
    except OSError:
        raise Row(where, {"images": name}).wrong("images", "pictures that are there") from None
    return read_image(data, where=where, limits=limits)
