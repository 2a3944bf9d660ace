"""Play scripted demonstrations against the real tools and keep them as training rows.

The prompts, observations and pictures come from the same code as in a rollout, so
a warm-started policy meets exactly the tokens it was trained on.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tapo_train.demo.world.demonstrations import Faults, Script, demonstrate
from tapo_train.demo.world.questions import Question
from tapo_train.errors import DataError
from tapo_train.learner.batch import TrainingRow
from tapo_train.rollout.chat import ChatFormat
from tapo_train.tools.base import ToolContext
from tapo_train.tools.toolbox import Toolbox
from tapo_train.types import Span, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """One recorded attempt: its training row and the answer it ended with."""

    row: TrainingRow
    answer: str


class Demonstrator:
    """Records demonstrations over the tasks of one world.

    Args:
        observation_weight: loss weight of what the tools answered, beside 1 for the turns.
    """

    def __init__(
        self,
        chat: ChatFormat,
        toolbox: Toolbox,
        *,
        system_prompt: str,
        faults: Faults,
        observation_weight: float = 0.0,
    ) -> None:
        self._chat = chat
        self._toolbox = toolbox
        self._system_prompt = system_prompt
        self._schemas = toolbox.schemas()
        self._faults = faults
        self._observation_weight = observation_weight
        self._controls = np.array([*chat.banned_token_ids, chat.end_token_id])

    def record(self, tasks: Sequence[Task], *, seed: int) -> Iterator[Demonstration]:
        """One demonstration per task; the same seed gives the same ones."""
        with asyncio.Runner() as runner:
            for task in tasks:
                rng = random.Random(f"demonstration/{seed}/{task.id}")
                script = demonstrate(question_of(task), rng, faults=self._faults)
                yield runner.run(self._play(task, script))

    async def _play(self, task: Task, script: Script) -> Demonstration:
        parts = [
            self._chat.prompt(task, system_prompt=self._system_prompt, tool_schemas=self._schemas)
        ]
        images, length = task.images, len(parts[0])
        spans, weights = list[Span](), list[float]()
        text = next(script)
        while True:
            turn = self._chat.assistant(text)
            parts.append(turn)
            spans.append(Span(start=length, end=length + len(turn)))
            weights.append(1.0)
            parsed = self._chat.read(text)
            if not parsed.calls:
                break
            call = parsed.calls[0]
            context = ToolContext(images=images, task=task)
            request = self._toolbox.read(call.name, call.arguments)
            seen = await self._toolbox.execute(request, context)
            parts.append(self._chat.observation([seen]))
            images += seen.images
            if self._observation_weight > 0:
                for run in self._plain_runs(parts[-1]):
                    start = length + len(turn)
                    spans.append(Span(start=start + run.start, end=start + run.end))
                    weights.append(self._observation_weight)
            length = sum(len(part) for part in parts)
            text = script.send(seen)
        row = TrainingRow.supervised(
            id=task.id,
            tokens=np.concatenate(parts),
            images=images,
            spans=tuple(spans),
            weights=weights,
        )
        return Demonstration(row=row, answer=parsed.answer or "")

    def _plain_runs(self, tokens: npt.NDArray[np.int32]) -> list[Span]:
        """The stretches of `tokens` without control tokens and image placeholders."""
        plain = np.isin(tokens, self._controls, invert=True)
        edges = np.flatnonzero(np.diff(np.concatenate([[False], plain, [False]]).astype(np.int8)))
        pairs = edges.reshape(-1, 2).tolist()
        return [Span(start=start, end=end) for start, end in pairs]


def question_of(task: Task) -> Question:
    """The scripted view of a world task; DataError for a task of another origin."""
    try:
        about = task.metadata["world"]
        return Question(
            id=task.id,
            text=task.question,
            answer=task.answers[0],
            panels=tuple((str(colour), str(name)) for colour, name in about["panels"]),
            target=int(about["target"]),
            house=str(about["house"]),
            key=str(about["key"]),
            relations=tuple(map(str, about["relations"])),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"task {task.id}: {type(error).__name__}: {error}; "
            "demonstrations need tasks that `world` wrote"
        ) from error
