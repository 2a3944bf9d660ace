"""Which questions a model can be asked at all, found before anything is played."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tapo_train.errors import AlignmentError
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.template import Schema
from tapo_train.types import Task

__all__ = ["Playable"]


class Playable:
    """Judges questions by the room they leave, and pictures by what the processor takes.

    What a prompt is made of is counted, and not put together for each question anew: system
    prompt and tool schemas are the same for all with as many pictures.

    Args:
        max_tokens: of a whole trajectory; a prompt has to leave room for an answer.
    """

    def __init__(
        self,
        chat: ChatFormat,
        *,
        system_prompt: str,
        tool_schemas: Sequence[Schema],
        max_tokens: int,
    ) -> None:
        self._chat = chat
        self._system_prompt = system_prompt
        self._tool_schemas = tool_schemas
        self._max_tokens = max_tokens
        self._around: dict[int, int] = {}

    def problem(self, task: Task) -> str | None:
        """Why the task cannot be played; None if it can."""
        try:
            num_tokens = self._num_tokens(task)
        except AlignmentError as error:
            return f"task {task.id}: {error}"
        if num_tokens >= self._max_tokens:
            return (
                f"task {task.id}: its prompt has {num_tokens} tokens; wanted fewer than "
                f"rollout.max_tokens = {self._max_tokens} (raise it, or use smaller pictures)"
            )
        return None

    def problems(self, tasks: Iterable[Task]) -> list[str | None]:
        """That of each task, in order."""
        return [self.problem(task) for task in tasks]

    def _num_tokens(self, task: Task) -> int:
        """Length of the task's prompt."""
        pictures = sum(map(self._chat.image_tokens, task.images))
        own = pictures + len(self._chat.plain(task.question))
        if (num := len(task.images)) not in self._around:
            prompt = self._chat.prompt(
                task, system_prompt=self._system_prompt, tool_schemas=self._tool_schemas
            )
            self._around[num] = len(prompt) - own
        return self._around[num] + own
